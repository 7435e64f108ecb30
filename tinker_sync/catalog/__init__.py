"""The index of what is known: `schema` has the tables, `store` reads and writes them.

Delete it and run `tinker-sync reindex`: all but the history of failures is back. A catalog of another schema version
is rebuilt, not migrated. SQLAlchemy stops here.
"""
