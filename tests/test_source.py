"""What is said of a data set that deviates from what is published."""

import logging

import numpy as np
import pytest

from metajax.data import images, source

pytestmark = pytest.mark.usefixtures('tables')


@pytest.fixture(autouse=True)
def warnings_alone(caplog):
  caplog.set_level(logging.WARNING, 'metajax')


def load(data, counts, published=True, notes=()):
  """Obtains a data set with so many images of each class."""
  (data / 'file').touch()
  classes = {c: [images.Row(np.zeros((1, 2, 2), np.uint8), 0, 'file')] * count for c, count in counts.items()}
  form = source.Format(
    'file', lambda folder: [str(data / 'file')], lambda paths, scratch: source.Contents(classes, notes=notes)
  )
  return source.obtain(
    source.Dataset('name', 'Title', (form,), counts=dict.fromkeys(counts, 9) if published else {}),
    str(data),
    images.Rendering(2),
  )


def test_many_classes_of_another_size_share_a_line(data, caplog):
  load(data, {f'class{k:03d}': 1 + k % 2 for k in range(340)} | {'whole': 9})
  [line] = caplog.messages
  assert line.startswith('Title is not as published: class class000 has 1 images, not 9, and 339 more classes have')
  assert line.endswith(': class001, class002, class003, class004, class005, ...')


def test_few_classes_of_another_size_have_lines_of_their_own(data, caplog):
  load(data, {'a': 8, 'b': 7, 'whole': 9})
  assert caplog.messages == [
    'Title is not as published: class a has 8 images, not 9',
    'Title is not as published: class b has 7 images, not 9',
  ]


@pytest.mark.parametrize(('notes', 'lines'), [(5, 5), (6, 5), (300, 5)])
def test_at_most_five_lines_are_said(data, caplog, notes, lines):
  load(data, {'a': 2}, published=False, notes=tuple(f'note {k}' for k in range(notes - 1)))  # and one on single colours
  assert len(caplog.messages) == lines
  assert caplog.messages[0] == 'Title: note 0'
  if notes > lines:
    assert caplog.messages[-1].startswith(f'and {notes - 4} more such notes')


@pytest.mark.parametrize('published', [True, False])
def test_published_images_are_as_they_are(data, published):
  assert len(load(data, {'a': 9}, published).notes) == (0 if published else 1)
