# The fleet of pages as a graph: checkpoints verified -> pages executed -> dashboard. Everything follows from the cards.
#
#   snakemake --profile profiles/local --config profile=smoke                       all pages
#   snakemake --profile profiles/local --config profile=cpu -- results/cpu/dit-moe.json   one page
#   snakemake --profile profiles/slurm --config profile=gpu                         the same graph on a cluster
#
# A page runs again when its text, its card, the constraints, a checkpoint or a minilib module it imports has other contents.
# Modules that only record and lay out (minilib.keys.BOOKKEEPING) do not count: they cannot change a number.

import os
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from minilib.cards import PROFILES, all_cards
from minilib.keys import BOOKKEEPING, imported_modules
from minilib.resources import zoo_dir

PROFILE = config.get("profile", "smoke")
if PROFILE not in PROFILES:
    raise WorkflowError(f"profile is {PROFILE!r}; expected one of: {', '.join(PROFILES)}")
RESULTS = config.get("results", "results")
OUT = f"{RESULTS}/{PROFILE}"
ALL_CARDS = {card.slug: card for card in all_cards(workflow.basedir)}
# A card is written before its page.
CARDS = {slug: card for slug, card in ALL_CARDS.items() if Path(workflow.basedir, card.text).is_file()}
# An experiment of the cpu profile uses two one-thread processes, so one such page at a time fills two cores.
THREADS = 2 if PROFILE == "cpu" else 1

# Jobs use this environment's Python and one thread a process. A page ends soon after the fleet, also if that was killed.
shell.prefix(f"export PATH={Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1 FLEET={os.getpid()}; ")


def modules(slug):
    """Files of the minilib modules whose code the page's numbers depend on."""
    text = Path(workflow.basedir, CARDS[slug].text).read_text(encoding="utf-8")
    try:
        found = imported_modules(text, Path(workflow.basedir, "minilib"))
    except SyntaxError:  # the page itself will say so when it runs, and only that page
        found = {}
    return [os.path.relpath(path, workflow.basedir) for name, path in found.items() if name not in BOOKKEEPING]


def weights(name):
    return os.path.relpath(zoo_dir() / f"{name}.safetensors", workflow.basedir)


wildcard_constraints:
    slug="|".join(CARDS) or "none",
    name="[A-Za-z0-9_-]+",


localrules:
    all,
    dashboard,


# The records are named too: a dashboard that is still there must not hide that a page's record is gone.
rule all:
    input:
        f"{OUT}/dashboard.csv",
        expand(f"{OUT}/{{slug}}.json", slug=CARDS),


rule zoo:
    input:
        weights=lambda w: weights(w.name),
        list=os.path.relpath(zoo_dir() / "zoo.toml", workflow.basedir),
    output:
        touch(f"{RESULTS}/zoo/{{name}}.ok"),
    resources:
        mem_mb=1000,
        runtime=5,
    shell:
        "python -m minilib.zoo check {wildcards.name}"


rule page:
    input:
        text=lambda w: CARDS[w.slug].text,
        card="reproductions/{slug}/paper.toml",
        constraints="constraints.txt",
        modules=lambda w: modules(w.slug),
        weights=lambda w: [weights(name) for name in CARDS[w.slug].zoo],
        # Verified first; but a new entry for another checkpoint, which verifies all again, is no reason to run.
        checked=lambda w: [ancient(f"{RESULTS}/zoo/{name}.ok") for name in CARDS[w.slug].zoo],
    output:
        notebook=f"{OUT}/{{slug}}.ipynb",
        record=f"{OUT}/{{slug}}.json",
    log:
        f"{OUT}/logs/{{slug}}.log",
    benchmark:
        f"{OUT}/logs/{{slug}}.tsv"
    threads: THREADS
    resources:
        mem_mb=lambda w: CARDS[w.slug].mem_mb,
        runtime=lambda w: max(5, round(2 * CARDS[w.slug].minutes[PROFILE])),
        **({"gpu": 1, "gpu_manufacturer": "nvidia"} if PROFILE == "gpu" else {}),
    params:
        profile=PROFILE,
        out=OUT,
        failed=f"{OUT}/logs/{{slug}}.failed.txt",
    shell:
        # An experiment runs as many processes as the page was given threads.
        "rm -f {params.failed}; export MINILIB_JOBS={threads}; "
        "python -m minilib.publish execute {wildcards.slug} --profile {params.profile} --out {params.out} "
        "--end-with $FLEET > {log} 2>&1 || {{ tail -n 2 {log} > {params.failed}; exit 1; }}"


rule dashboard:
    input:
        expand(f"{OUT}/{{slug}}.json", slug=CARDS),
    output:
        f"{OUT}/dashboard.csv",
    shell:
        "python -m minilib.publish dashboard {output} {input}"


onstart:
    if workflow.is_main_process:
        # Snakemake's own lock outlives kill -9 and then refuses to start; profiles/local turns it off. This one is held by
        # the process and freed by the system with it, so a fleet that was killed starts again with the same command.
        import fcntl

        logs = Path(OUT, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        workflow.globals["fleet_lock"] = open(Path(OUT, ".fleet.lock"), "w")
        try:
            fcntl.flock(workflow.globals["fleet_lock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkflowError(f"another fleet is running in {OUT}; wait for it, or stop it")
        for stale in logs.glob("*.failed.txt"):
            stale.unlink()


onsuccess:
    if workflow.is_main_process:
        print(f"\nAll pages ran: {OUT}/dashboard.csv", file=sys.stderr)


onerror:
    if workflow.is_main_process:
        marks = sorted(Path(OUT, "logs").glob("*.failed.txt"))
        failed = [path for path in marks if not Path(OUT, path.name.replace(".failed.txt", ".json")).exists()]
        print(f"\nFailed pages: {len(failed)}", file=sys.stderr)
        for path in failed:
            slug = path.name.removesuffix(".failed.txt")
            print(f"  {slug}: see {OUT}/logs/{slug}.log", file=sys.stderr)
            print("".join(f"    {line}\n" for line in path.read_text().splitlines()), end="", file=sys.stderr)
