"""One self-contained HTML page per run or comparison: what was found, how sure it is, and where the models look."""

from foveal.report.page import comparison_page, run_page

__all__ = ["comparison_page", "run_page"]
