"""How Sphinx builds this site: `make docs`."""

import os
import socket
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]
# What the notebook starts must find this checkout too, and few threads: its processes share the machine.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lasp  # noqa: E402

# The notebook's torchruns meet at a port that is free.
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ["PET_MASTER_PORT"] = str(free.getsockname()[1])

project = "LASP"
author = "the LASP contributors"
release = version = lasp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "plain_docstrings",
    "command_line",
]
exclude_patterns = ["_build", "_ext"]
root_doc = "index"

# -- pages in Markdown, notebooks ------------------------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 170
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True

# -- the reference ---------------------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Returns", "returns_style")]
default_role = "code"
# Mixers each have a `Config` of their own, which a signature calls by that name alone.
suppress_warnings = ["ref.python"]

# -- how it looks ----------------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"LASP {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
