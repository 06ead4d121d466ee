"""READ BACK and prepare: one program a file, run from the checkout as ``python -m tools.<verb_noun>``.

In: data folders, run folders, checkpoints. Out: a few lines on the screen, files, an exit code
(`ii_dist.config.errors` lists them).
"""

__all__: list[str] = []
