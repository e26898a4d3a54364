"""Text to batches: tokenizer, prompt templates, records, prepared data sets and the loader."""

from __future__ import annotations

from pyalpaca.data.indexed import IndexedDataset as IndexedDataset
from pyalpaca.data.indexed import indexed_writer as indexed_writer
from pyalpaca.data.indexed import open_indexed as open_indexed
from pyalpaca.data.loader import Data as Data
from pyalpaca.data.loader import InstructionData as InstructionData
from pyalpaca.data.loader import TextData as TextData
from pyalpaca.data.loader import batch as batch
from pyalpaca.data.loader import open_instruction_data as open_instruction_data
from pyalpaca.data.loader import open_text_data as open_text_data
from pyalpaca.data.loader import split_bounds as split_bounds
from pyalpaca.data.loader import split_instruction_data as split_instruction_data
from pyalpaca.data.loader import split_text_data as split_text_data
from pyalpaca.data.tokenizer import Tokenizer as Tokenizer
from pyalpaca.data.tokenizer import load_tokenizer as load_tokenizer
from pyalpaca.data.tokenizer import stream_decoder as stream_decoder
