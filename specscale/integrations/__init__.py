"""Callbacks for other libraries' training loops; each module here imports the library that it is named after."""
