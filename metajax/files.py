"""Writing a file so that it is there whole or not at all."""

from pathlib import Path


def write_atomically(path, content):
  """Replaces a file by str or bytes; whoever is killed in the middle, or finds the disk full, leaves the old one."""
  temporary = Path(f'{path}.tmp')
  content = content.encode() if isinstance(content, str) else content
  try:
    temporary.write_bytes(content)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  temporary.replace(path)
