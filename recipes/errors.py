"""The one error type that means "the user can fix this"; it is shown without a traceback."""

__all__ = ["RecipeError"]


class RecipeError(ValueError):
    """A setting, folder or file that keeps a recipe from running; the message says the way out."""
