"""Text to batches: tokenizer, prompt templates, records, prepared data sets and the loader."""

from __future__ import annotations

from pyalpaca.data.indexed import IndexedDataset as IndexedDataset
from pyalpaca.data.indexed import indexed_writer as indexed_writer
from pyalpaca.data.indexed import open_indexed as open_indexed
from pyalpaca.data.instruction import HANDLERS as HANDLERS
from pyalpaca.data.instruction import PRETRAIN as PRETRAIN
from pyalpaca.data.loader import Data as Data
from pyalpaca.data.loader import InstructionData as InstructionData
from pyalpaca.data.loader import TextData as TextData
from pyalpaca.data.loader import batch as batch
from pyalpaca.data.loader import fingerprint as fingerprint
from pyalpaca.data.loader import open_instruction_data as open_instruction_data
from pyalpaca.data.loader import open_text_data as open_text_data
from pyalpaca.data.loader import ordered_batch as ordered_batch
from pyalpaca.data.loader import split_bounds as split_bounds
from pyalpaca.data.loader import split_instruction_data as split_instruction_data
from pyalpaca.data.loader import split_text_data as split_text_data
from pyalpaca.data.merge_tokenizers import merge_tokenizers as merge_tokenizers
from pyalpaca.data.merge_tokenizers import write_tokenizer_folder as write_tokenizer_folder
from pyalpaca.data.packing import PackedData as PackedData
from pyalpaca.data.packing import batch_starts as batch_starts
from pyalpaca.data.packing import pack as pack
from pyalpaca.data.preprocess import Job as Job
from pyalpaca.data.preprocess import Summary as Summary
from pyalpaca.data.preprocess import preprocess as preprocess
from pyalpaca.data.prompts import TEMPLATES as TEMPLATES
from pyalpaca.data.prompts import Message as Message
from pyalpaca.data.prompts import Template as Template
from pyalpaca.data.prompts import find_template as find_template
from pyalpaca.data.prompts import generation_prompt as generation_prompt
from pyalpaca.data.prompts import prompt_text as prompt_text
from pyalpaca.data.prompts import user_message as user_message
from pyalpaca.data.records import read_records as read_records
from pyalpaca.data.tokenizer import Tokenizer as Tokenizer
from pyalpaca.data.tokenizer import load_tokenizer as load_tokenizer
from pyalpaca.data.tokenizer import stream_decoder as stream_decoder
