"""Documents that people read: one description, rendered as a self-contained HTML page or as Markdown.

from mlxkd.report import Document, Figure, Heading, Text, plots
Document("Run 7", [Heading("Loss"), Figure(plots.curves({"train": (steps, loss)}), alt="loss falls")]).write("r.html")
"""

from mlxkd.report.document import Document
from mlxkd.report.sections import Code, Conversation, Figure, Heading, Section, Table, Text, Tiles
from mlxkd.report.values import show_value

__all__ = [
    "Code",
    "Conversation",
    "Document",
    "Figure",
    "Heading",
    "Section",
    "Table",
    "Text",
    "Tiles",
    "show_value",
]
