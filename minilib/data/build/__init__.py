"""Scripts that build the vendored assets from published packages: ``python -m minilib.data.build NAME --from PATH``.

They run once, on a machine that has the packages; pages and tests read the result. One module an asset, each with
``build(folder: Path) -> Built``. The same archives give the same bytes.
"""
