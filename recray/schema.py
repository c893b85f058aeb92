"""The tables that stages exchange: the only thing one stage knows about another.

Every item is known inside recray by `item`, its row in the items table (0 .. num_items - 1): that row order is a
seeded shuffle, so the number carries nothing of the order in which a catalogue was numbered. Users are strings.

    STAGE/TABLE               rows
    ingest/interactions       one a usable interaction
    ingest/items              one an item, in `item` order
    ingest/other_ids          one an item and column of the catalogue that is another id; for the audit alone
    ingest/rejected           one an input row that was set aside, with file, row and reason
    sequences/histories       one a training history: everything a user met in the training split, in time order
    sequences/train           one an alignment example: a cut of a history into (history, target)
    sequences/validation      one an evaluation row, with its candidates
    sequences/test            as validation; never read before `evaluate`
    audit/rules               one a rule without learning
    users/items               one an item: its SASRec vector
    users/train|validation|test   one a row of the split of that name: the user's vector after `history`
    users/crossfit_items      one a fold and item, with users.folds=2: its vector by the model fitted without that fold
    users/crossfit_train      one a row of sequences/train, with users.folds=2: the vector by the model without its user
    negatives/train           one a row of sequences/train
    negatives/pools           one a row of sequences/train, for samplers that draw from a model's top list
    reference/train           one a row of sequences/train
    evaluate/rows             one a (model, row of sequences/test)
    evaluate/written          one a (language model, row of a sample of sequences/test)
"""

import pyarrow as pa

ITEM = pa.int32()
ITEMS = pa.list_(pa.int32())
VECTOR = pa.list_(pa.float32())

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item", ITEM),
        ("time", pa.int64()),  # seconds since 1970, or the published position where a log has no clock
        ("rating", pa.float32()),  # null where the log has none
        (
            "tie_break",
            pa.int64(),
        ),  # orders interactions of one user at one time; a seeded hash, or the position
    ]
)

CATALOGUE = pa.schema(
    [
        ("item", ITEM),
        ("item_id", pa.string()),  # as in the user's catalogue
        ("title", pa.string()),
        ("label", pa.string()),  # the title, with a suffix where another item has the same: unique
        ("genres", pa.list_(pa.string())),  # empty where the catalogue has none
    ]
)

REJECTED = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),  # 0-based row of the file, header not counted
        ("reason", pa.string()),
        ("content", pa.string()),  # the row as JSON, cut at 500 characters
    ]
)

OTHER_IDS = pa.schema([("item", ITEM), ("column", pa.string()), ("number", pa.int64())])

HISTORIES = pa.schema([("row", pa.int64()), ("user_id", pa.string()), ("items", ITEMS)])

EXAMPLES = pa.schema([("row", pa.int64()), ("user_id", pa.string()), ("history", ITEMS), ("target", ITEM)])

EVALUATION = pa.schema(
    [
        ("row", pa.int64()),
        ("user_id", pa.string()),
        ("history", ITEMS),
        ("target", ITEM),
        ("candidates", ITEMS),  # holds the target exactly once, at a seeded place
    ]
)

ITEM_VECTORS = pa.schema([("item", ITEM), ("vector", VECTOR)])
ROW_VECTORS = pa.schema([("row", pa.int64()), ("vector", VECTOR)])
CROSSFIT_ITEMS = pa.schema([("fold", pa.int32()), ("item", ITEM), ("vector", VECTOR)])
CROSSFIT_ROWS = pa.schema([("row", pa.int64()), ("fold", pa.int32()), ("vector", VECTOR)])
NEGATIVES = pa.schema([("row", pa.int64()), ("negatives", ITEMS)])  # prefix-nested: the first N of any larger draw
# How many of a row's negatives are its sampler's own, where one has a fallback for the others.
COUNTED_NEGATIVES = NEGATIVES.append(pa.field("own", pa.int32()))

POOLS = pa.schema(
    [
        ("row", pa.int64()),
        ("version", pa.int32()),  # of the model: 0 is sft/model
        ("items", ITEMS),  # candidates that the row's user did not meet, best first
        ("scores", pa.list_(pa.float32())),  # log pi(item | prompt of row), nats, summed over the item's tokens
    ]
)

REFERENCE = pa.schema(
    [
        ("row", pa.int64()),
        (
            "items",
            ITEMS,
        ),  # the target, then the negatives: scores are joined by (row, item), never by position
        (
            "scores",
            pa.list_(pa.float32()),
        ),  # log pi_ref(item | prompt of row), nats, summed over the item's tokens
    ]
)

RANKED_ROWS = pa.schema(
    [
        ("model", pa.string()),
        ("row", pa.int64()),
        ("user_id", pa.string()),
        ("target", ITEM),
        ("num_candidates", pa.int32()),
        ("rank", pa.int32()),  # of the target, from 1, ties against us
        ("ranked", ITEMS),  # the candidates, best first, at most `evaluate.keep_ranked`
    ]
)

WRITTEN_ROWS = pa.schema(
    [
        ("model", pa.string()),
        ("row", pa.int64()),
        ("user_id", pa.string()),
        ("target", ITEM),
        ("text", pa.string()),  # what the model wrote freely, without the end token
        ("ended", pa.bool_()),  # whether it wrote the end token before it had written as much as the longest item
        ("item", ITEM),  # that the text is, as a whole; null where it is none
        ("in_candidates", pa.bool_()),  # whether that item is a candidate of the row
    ]
)

AUDIT = pa.schema(
    [
        ("rule", pa.string()),
        ("kind", pa.string()),  # baseline or suspect
        ("metric", pa.string()),  # hr@1
        ("value", pa.float64()),
        ("low", pa.float64()),  # null where too few users leave the interval unknown
        ("high", pa.float64()),
        ("chance", pa.float64()),  # of drawing one candidate at random
        ("verdict", pa.string()),  # leak, look or clear
        ("reason", pa.string()),
        ("advice", pa.string()),
    ]
)
