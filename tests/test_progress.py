import pytest

from metajax import progress


def test_speed_and_waiting_are_shares_of_the_time_without_pauses(monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(progress.time, 'perf_counter', lambda: now)
  shown = progress.Progress(total=40, start=0, tasks=4)
  shown.waited(0.25)
  shown.waited(0.25)
  shown.pause(5)
  now += 15
  assert shown.log(20, {'loss': 1.0}) == {'time/tasks_per_second': 8.0, 'time/waiting_for_data': pytest.approx(0.05)}
  line = 'step 20/40: loss 1.0000, 8 tasks/s, 00:10 left'
  assert capsys.readouterr().out == f'{line}, 5 % of the time waiting for data\n'

  shown.waited(0.1)  # what was told before does not count again, and a hundredth is not worth a word
  now += 10
  assert shown.log(30, {'loss': 1.0}) == {'time/tasks_per_second': 4.0, 'time/waiting_for_data': pytest.approx(0.01)}
  assert 'waiting' not in capsys.readouterr().out
