import os

# Every module of minilib is imported under beartype: a wrong shape or type in a public signature fails the tests.
from jaxtyping import install_import_hook

if os.environ.get("MINILIB_TYPECHECK", "1") == "1":
    install_import_hook("minilib", "typecheck.checker")
