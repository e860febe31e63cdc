import gzip
import json

import pytest

from metajax import main
from metajax.errors import UserError
from metajax.profiling import Profile
from tests.conftest import TINY


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ('10', 'FIRST:LAST'),
    ('a:b', 'FIRST:LAST'),
    ('3:2', 'FIRST:LAST'),
    ('0:2', 'FIRST:LAST'),
    ('3:7', 'the last meta-update is config.total_steps = 6'),
  ],
)
def test_a_range_that_cannot_be_is_refused(setting, message):
  with pytest.raises(UserError, match=rf'config\.profile .*{setting}.*') as error:
    Profile(setting, 6, 'run')
  assert message in str(error.value)


def test_a_resumed_run_traces_the_meta_updates_of_these_numbers(cache, tmp_path, capsys):
  def run(total, *arguments):
    arguments = f'--config={TINY}', f'--workdir={tmp_path}', '--mode=train', '--config.model.name=mlp', *arguments
    assert main.main(['metajax', *arguments, f'--config.total_steps={total}']) == 0
    return capsys.readouterr().out

  run(3)
  assert not (tmp_path / 'profile').exists()
  run(6, '--config.profile=4:5')
  (path,) = tmp_path.glob('profile/plugins/profile/*/*.trace.json.gz')
  with gzip.open(path) as file:
    events = [event for event in json.load(file)['traceEvents'] if 'args' in event]
  updates = {event['args']['step_num'] for event in events if event['name'] == 'meta-update'}
  assert updates == {'4', '5'}
  # What the device did, not Python alone: as many executions of the program, with its operations, and no third.
  assert len({event['args']['run_id'] for event in events if 'hlo_op' in event['args']}) == 2
  assert 'done already and will not be traced' in run(7, '--config.profile=4:5')
