"""``teacher_scenes``: pictures that the zoo's ``mmdit_shapes32`` draws of captions, to distil students on.

CLEAR (Liu et al. 2024, arXiv 2412.16112) trains on pictures of the teacher itself; so no student sees a picture that the
teacher was not able to draw. None is left out, the wrong ones neither.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from minilib import zoo
from minilib.data import shapes
from minilib.data.build.tools import Built, Source, archive, npz_bytes
from minilib.recipes.scenes import draw_scenes, flow_scheduler

SOURCE = Source(
    package="minilib zoo mmdit_shapes32",
    version="8761b0a4cb9c",
    file="mmdit_shapes32.safetensors",
    sha256="8761b0a4cb9c2cea0398b8b251b5b06fb28429e6d76dd8baacac7a993ffe996a",
    get="git checkout minilib/assets/zoo, which is the folder to give",
)
COUNTS = {"train": 896, "test": 128}
SIZE, STEPS, GUIDANCE_SCALE, SEED = 32, 25, 3.0, 20_000
CREDIT = """# teacher_scenes

1,024 pictures of 32 x 32 pixels with their captions, drawn by the zoo's own `mmdit_shapes32` (minilib zoo mmdit_shapes32,
`8761b0a4cb9c`: the first digits of its checksum) by Euler's method in 25 steps at guidance 3. The captions are generated
too. Nobody else's data are in them.

Licence: Apache-2.0, as the code.
"""


def build(folder: Path) -> Built:
    """Draw the pictures; ``folder`` holds the checkpoint. About five minutes on one core.

    Raises:
        BuildError: the checkpoint is missing, or another one.
    """
    archive(folder, SOURCE)
    model = zoo.load("mmdit_shapes32", root=folder)
    tokens, images = [], []
    for i, (split, n) in enumerate(COUNTS.items()):
        scenes = shapes.sample_scenes(n, torch.Generator().manual_seed(SEED + i), objects=(1, 3), split=split)
        tokens.append(shapes.tokens(scenes))
        drawn = draw_scenes(
            model,
            tokens[-1],
            flow_scheduler(),
            size=SIZE,
            steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            seed=SEED + i,
            batch=64,
        )
        images.append(((drawn + 1) * 127.5).round().to(torch.uint8))
    arrays = {
        "images": torch.cat(images).permute(0, 2, 3, 1).numpy(),
        "tokens": torch.cat(tokens).to(torch.uint8).numpy(),
    }
    return Built(
        suffix=".npz",
        data=npz_bytes(arrays, zipfile.ZIP_LZMA),
        what="1,024 scenes of 32 x 32 pixels as the zoo's mmdit_shapes32 draws them, with captions, to distil students on",
        licence="Apache-2.0",
        credit=CREDIT,
        sources=(SOURCE,),
        extra={"train": COUNTS["train"], "held_out": COUNTS["test"]},
    )
