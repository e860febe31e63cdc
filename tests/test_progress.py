import pytest

from metajax import progress


def test_speed_and_waiting_are_shares_of_the_time_without_pauses(monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(progress.time, 'perf_counter', lambda: now)
  shown = progress.Progress(total=40, start=0, tasks=4, seconds=1000.0)
  shown.waited(0.25)
  shown.waited(0.25)
  shown.pause(5)
  now += 15
  expected = {'time': 1010, 'tasks_per_second': 8.0, 'waiting_for_data': pytest.approx(0.05)}
  assert shown.log(20, {'loss': 1.0}) == expected
  line = 'step 20/40: loss 1.0000, 8 tasks/s, 00:10 left'
  assert capsys.readouterr().out == f'{line}, 5 % of the time waiting for data\n'

  shown.waited(0.1)  # what was told before does not count again, and a hundredth is not worth a word
  now += 10
  expected = {'time': 1020, 'tasks_per_second': 4.0, 'waiting_for_data': pytest.approx(0.01)}
  assert shown.log(30, {'loss': 1.0}) == expected
  assert 'waiting' not in capsys.readouterr().out


@pytest.mark.parametrize(
  ('seconds', 'speed'), [(0.004, '1000'), (0.0123, '325'), (3, '1.33'), (48, '0.0833'), (0.0001, '40000')]
)
def test_speed_has_three_significant_digits(seconds, speed, monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(progress.time, 'perf_counter', lambda: now)
  shown = progress.Progress(total=40, start=0, tasks=4)
  now += seconds
  shown.log(1, {'loss': 1.0})
  assert f', {speed} tasks/s, ' in capsys.readouterr().out
