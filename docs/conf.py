"""Builds the documentation: sphinx-build -W docs docs/_build"""

import metajax

project = 'metajax'
author = 'The metajax authors'
release = metajax.__version__
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build', 'results_table.md']
html_theme = 'furo'
html_title = f'metajax {release}'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
napoleon_use_rtype = False
