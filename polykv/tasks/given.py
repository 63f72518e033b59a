"""What is given to those who are asked a task's questions: the document, or a control. Torch-free."""

DOCUMENT = "document"
OTHER = "other"  # the pool of another document
NOTHING = "nothing"  # no document
