// Greedy generation in Node: node generate.mjs MODEL COUNT TOKEN...
//
// Prints COUNT new tokens after the prompt's. onnxruntime-node can't register a library of custom operators, so the
// model's portable functions run. The key-value cache and the sink state are whatever inputs the model has that begin
// with "past": the output that continues each one is the next step's input.
import { InferenceSession, Tensor } from 'onnxruntime-node';

// Arrays of the types that states can have.
const ARRAYS = { float32: Float32Array, float16: Uint16Array };

// past_key_values.0.key -> present.0.key, past_sink_scores.0 -> present_sink_scores.0
const presentName = (past) => past.replace(/^past(_key_values)?/, 'present');

// The state before the first token: (1, heads, 0, size) for each input (batch, heads, past, size).
function emptyState(session) {
  const state = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (!name.startsWith('past')) continue;
    const [, heads, , size] = shape;
    if (typeof heads !== 'number' || typeof size !== 'number') {
      throw new Error(`the model doesn't say how many heads ${name} has, and of which size`);
    }
    if (!(type in ARRAYS)) throw new Error(`${name} is ${type}, which isn't known here`);
    state[name] = new Tensor(type, new ARRAYS[type](0), [1, heads, 0, size]);
  }
  return state;
}

const integers = (numbers) => new Tensor('int64', BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

// A number that is ordered as the logit is: float16 comes as bits, whose order is that of the numbers but for the sign.
const key = (type, value) => (type === 'float16' && value & 0x8000 ? -(value & 0x7fff) : value);

// The likeliest token after the last position of logits (1, positions, vocabulary).
function nextToken({ data, dims, type }) {
  const vocabulary = dims[2];
  const values = type === 'float16' ? new Uint16Array(data.buffer, data.byteOffset, data.length) : data;
  const first = values.length - vocabulary;
  let best = 0;
  for (let i = 1; i < vocabulary; i++) {
    if (key(type, values[first + i]) > key(type, values[first + best])) best = i;
  }
  return best;
}

async function* generate(session, prompt, count) {
  let state = emptyState(session);
  let tokens = prompt;
  let seen = 0;
  for (let step = 0; step < count; step++) {
    const positions = tokens.map((_, i) => seen + i);
    seen += tokens.length;
    const feeds = { ...state, input_ids: integers(tokens), attention_mask: integers(Array(seen).fill(1)) };
    if (session.inputNames.includes('position_ids')) feeds.position_ids = integers(positions);
    const outputs = await session.run(feeds);
    state = Object.fromEntries(Object.keys(state).map((past) => [past, outputs[presentName(past)]]));
    tokens = [nextToken(outputs.logits)];
    yield tokens[0];
  }
}

const [model, count, ...prompt] = process.argv.slice(2);
if (!prompt.length) {
  console.error('usage: node generate.mjs MODEL COUNT TOKEN...');
  process.exit(2);
}
const session = await InferenceSession.create(model, { logSeverityLevel: 3 });
const generated = [];
for await (const token of generate(session, prompt.map(Number), Number(count))) generated.push(token);
console.log(generated.join(' '));
