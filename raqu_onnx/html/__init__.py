"""`report.html`: one file for people, drawn from the files of a result folder alone.

It opens offline: style, scripts and plots are inside, and a content security policy keeps it from loading anything
else. Names in it come from strangers' models and are text everywhere.
"""

from raqu_onnx.html.page import render_page, write_html

__all__ = ["render_page", "write_html"]
