"""What is raised where the program would print an error."""


class Error(Exception):
    """A command that could not be done.

    `message` names the file or module, what was expected and what was found; `hint` says what can be
    done about it. Both are what the program prints.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"
