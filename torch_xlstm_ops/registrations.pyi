"""What type checkers see of the folder beside the package, which an installation puts inside it."""

from registrations import dynamo as dynamo
