"""The README's example of metajax as a library runs as printed."""

import re

import numpy as np

from tests.conftest import ROOT


def test_readme_example():
  readme = (ROOT / 'README.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
  assert len([line for line in code.splitlines() if line.strip()]) <= 30
  names = {}
  exec(code, names)
  assert names['accuracy'] > 0.9
  assert set(names['adapted'].params) == {'Dense_0', 'Dense_1'}
  before = names['params']['Dense_1']['kernel']
  assert not np.array_equal(before, names['adapted'].params['Dense_1']['kernel'])
