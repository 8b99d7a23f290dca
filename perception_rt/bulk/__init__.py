"""Embeds many items into a result on disk, and reads and searches such results.

`listing` and `sources` name the items, `contents` reads them, `run` embeds them shard by shard,
`shards` and `result` write and read the files of a result. `search` and `index` find rows,
`html_page` shows them.
"""
