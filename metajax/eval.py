"""Tests a trained run.

metajax eval --workdir=DIR [--data_dir=DIR] [--config=NAME[:ARGS]] [--config.KEY=VALUE ...]

  --workdir     folder of the run; its best checkpoint by validation is tested on the test episodes
  --data_dir    where archives of data sets lie or go; $METAJAX_DATA, else ~/metajax_data
  --config      the run's config, to change way and shot by its shorthands; by default the one that it kept
  --config.KEY  what evaluation may change: --config.eval.episodes=10000, --config.eval.inner_steps=10,
                --config.eval.way=20, --config.eval.head=ridge, --config.eval.ensemble=5, ...

Several processes take --coordinator, --num_processes and --process_id, see `metajax train --help`.

example: metajax eval --workdir=runs/quickstart --config.eval.episodes=2000
"""

import sys

from metajax import main as main_lib


def main(argv=None):
  """Runs a command line; returns the exit status."""
  return main_lib.main(argv, mode='eval', usage=__doc__)


if __name__ == '__main__':
  sys.exit(main())
