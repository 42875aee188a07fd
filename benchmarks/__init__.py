"""Measurements of two kinds; each module's docstring has its command.

What it costs, in time and memory:

- `run` (`make bench`) writes results.md: rows of two ways to do the same (`stage`, `stages_data`,
  `stages_files`, `stages_model`, `stages_records`) and whole steps (`whole_steps`, `growth`,
  `end_to_end` beside the `usual_loop`), with the tools `made`, `memory`, `section`, `stopwatch`;
- `backbones`, `large_image`, `exports_on_tissue` print tables of their own.

How good it is, on real tissue (CELLSEG_DATA) or made sets:

- `accuracy` (`make bench-accuracy`) writes accuracy.json: `our_recipe` beside `course_recipe`, both
  on `held_tissue`, whose tiles `consep_ids` tells apart; `published_report` makes report.pdf of it;
- `screen` tries one lever of the recipe, `optimism` what a split promises, `groups_on_tissue` what
  leaks, `made_sets` other tissue, `sample_baseline` the made tissue without learning.

The libraries' own ways, which are the reference, live here and nowhere in the package.
"""
