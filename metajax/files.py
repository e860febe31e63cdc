"""Writing a file so that it is there whole or not at all."""

from pathlib import Path


def write_atomically(path, text):
  """Replaces a text file; whoever is killed in the middle leaves the old one."""
  temporary = Path(f'{path}.tmp')
  temporary.write_text(text)
  temporary.replace(path)
