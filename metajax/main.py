"""Trains and evaluates what a config describes.

metajax train --config=NAME[:ARGS] [--workdir=DIR] [--mode=MODE] [--data_dir=DIR] [--config.KEY=VALUE ...]

  --config       name of a shipped config, or path of a file, and its shorthands: maml_omniglot:way=20,shot=1
  --workdir      folder of the run; runs/<config>[-<args>] by default. Run again, it resumes where it stopped
  --mode         train_and_eval (default), train, or eval, which needs only --workdir (see `metajax eval --help`)
  --data_dir     where archives of data sets lie or go; $METAJAX_DATA, else ~/metajax_data
  --config.KEY   any setting of the config, such as --config.algorithm.inner_steps=3

Several processes as one run, each with the same command (under Slurm and Open MPI they find one another):

  --coordinator    HOST:PORT, where process 0 listens
  --num_processes  how many there are
  --process_id     which of them this is, 0 to num_processes - 1

Also as python -m metajax.main.

example: metajax train --config=maml_omniglot:way=5,shot=1 --config.total_steps=2000
"""

import importlib.metadata
import sys
import traceback

import jax
from absl import flags

import metajax
from metajax import cli, parallel, processes, system, train, workdir
from metajax import config as config_lib
from metajax.errors import UserError


@cli.command
def main(argv, *, mode=None, usage=None):
  """Runs a command line.

  Args:
    argv: sys.argv by default.
    mode: what --mode would say, for a command that has no such flag.
    usage: what --help prints; by default what stands above, and the shipped configs.

  Returns:
    the exit status: 2, after one line on stderr, for what a user can mend.
  """
  cli.set_up()
  try:
    options, overrides = parse(argv, mode, usage)
    if place := processes.find_place(options.coordinator, options.num_processes, options.process_id):
      processes.start(place)
      processes.agree(_facts(options, overrides))

    def read_config():
      config = config_lib.load(options.config) if options.config else workdir.read_config(options.workdir)
      return config_lib.to_json(config_lib.override(config, overrides, note=print))

    config = config_lib.from_json(processes.from_first(read_config))
    if not place:
      parallel.use_cores(config.eval.episodes if options.mode == 'eval' else config.data.tasks)
    train.run(config, options.workdir, data_dir=options.data_dir, mode=options.mode)
    processes.finish()
    return 0
  except (Exception, KeyboardInterrupt) as error:
    status, line = cli.explain(error)
    processes.fail(status, line or traceback.format_exc(), by_device=isinstance(error, jax.errors.JaxRuntimeError))
    raise


def _facts(options, overrides):
  """What all processes of a run must have in common; folders may be called otherwise on another machine."""
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax')}
  source = {'metajax': metajax.__version__, "metajax's source": system.source_digest()}
  return {**source, **versions, '--config': options.config, '--mode': options.mode, 'settings': overrides}


def parse(argv, mode=None, usage=None):
  """Splits a command line into flags with their defaults filled in, and the overrides of the config."""
  overrides = config_lib.overrides(argv)
  values = flags.FlagValues()
  for name in ('config', 'workdir', 'data_dir', 'coordinator'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name in ('num_processes', 'process_id'):
    flags.DEFINE_integer(name, None, '', flag_values=values)
  if not mode:
    flags.DEFINE_enum('mode', 'train_and_eval', ['train', 'eval', 'train_and_eval'], '', flag_values=values)
  usage = usage or (lambda: f'{__doc__}\nconfigs:\n{cli.list_configs()}')
  rest = cli.parse_flags(values, [arg for arg in argv if arg not in overrides], usage)
  if mode:
    flags.DEFINE_string('mode', mode, '', flag_values=values)
  if rest:
    raise UserError(f'command line: do not know what to do with {rest[0]!r}; settings are --config.KEY=VALUE')
  if not values.config and not (values.mode == 'eval' and values.workdir):
    missing = '--workdir=DIR' if values.mode == 'eval' else '--config=NAME'
    example = '--workdir=runs/quickstart' if values.mode == 'eval' else '--config=quickstart'
    raise UserError(f'command line: {missing} is missing, such as {example}')
  if not values.workdir:
    values.workdir = cli.default_workdir(values.config)
  values.data_dir = cli.data_folder(values.data_dir)
  return values, overrides


if __name__ == '__main__':
  sys.exit(main())
