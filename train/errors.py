"""The two errors a user can cause. The command line prints their sentence and exits; it never shows
a traceback.
"""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, what is allowed, what to do. Exit status
    1.
    """

    exit_code = 1


class RecipeError(UserError):
    """The recipe or the command line is wrong; nothing has been started. Exit status 2.

    `problems` holds one line for each mistake, each beginning with its key path.
    """

    exit_code = 2

    def __init__(self, problems: list[str] | str, *, source: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        prefix = f"{source}: " if source else ""
        super().__init__("\n".join(prefix + line for line in self.problems))
