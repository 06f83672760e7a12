// Talking to the server: JSON, blobs and server-sent events by fetch, with the key that a person gave, and patience
// where the network or the server is away.

let tellOfLoss;
let askForKey;

/** How a person is told that the server cannot be reached (`tellOfLoss(true)`) or can again, and asked for a key
 * (`askForKey(wasRefused)`, which promises one). */
export function speakThrough(voice) {
  ({ tellOfLoss, askForKey } = voice);
}

/** What the server said no to, in its own words. */
class Refusal extends Error {
  constructor(status, { message, param }) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** JSON whose long seeds stay whole: as numbers they would lose digits above 2^53. A quote inside of a sentence has a
 * backslash before it, so this finds the field alone. */
function parse(text) {
  return JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));
}

async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem('key');
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers, cache: 'no-store' });
    tellOfLoss(false);
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    await keyOtherThan(key);
  }
}

async function refusal(response) {
  // The server is going down, or a gateway before it finds it gone: that passes, as a lost network does.
  if ([502, 503, 504].includes(response.status)) return new Error(`status ${response.status}`);
  const error = await response.json().then((body) => body.error, () => null);
  if (error?.message) return new Refusal(response.status, error);
  return new Refusal(response.status, { message: `The server answered with status ${response.status}.` });
}

let keyGiven = null;
/** Waits for a key, unless another one was given since `used` was sent. */
async function keyOtherThan(used) {
  if (sessionStorage.getItem('key') !== used) return;
  keyGiven ??= askForKey(used !== null).then((key) => {
    // A header takes Latin letters alone; fetch would throw as if the network were gone.
    sessionStorage.setItem('key', key.replace(/[^\x21-\x7e]/g, '?'));
    keyGiven = null;
  });
  await keyGiven;
}

/** Asks until an answer comes, which may be a refusal. */
async function persistently(path, read, { tries = Infinity, ...options } = {}) {
  for (let count = 1; ; count++) {
    try {
      return await read(await ask(path, options));
    } catch (error) {
      if (error instanceof Refusal || options.signal?.aborted) throw error;
      if (count >= tries) throw new Error('The server cannot be reached. Please try again later.');
      await pauseAfterLoss(count);
    }
  }
}
export const askJson = (path, options) => persistently(path, async (answer) => parse(await answer.text()), options);
export const askBlob = (path, options) => persistently(path, (answer) => answer.blob(), options);

/** The same key in every try of a request: one that arrived although its answer was lost makes no second clip. */
export const newKey = () => [...crypto.getRandomValues(new Uint32Array(4))].join('-');

export const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

async function pauseAfterLoss(count) {
  tellOfLoss(true);
  await pause(Math.min(2 ** (count - 1), 15));
}

/** Server-sent events of a response, one by one. */
async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  let event = { type: 'message', data: [] };
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    // A CR at the very end may be the first half of a CRLF: it waits for what follows.
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === '') {
        if (event.data.length) yield { ...event, data: parse(event.data.join('\n')) };
        event = { type: 'message', data: [] };
        continue;
      }
      const [, field, text] = line.match(/^([^:]*):? ?(.*)$/s); // a comment's field is empty
      if (field === 'data') event.data.push(text);
      else if (field === 'event') event.type = text;
      else if (field === 'id') event.id = text;
    }
  }
}

/** Hands each event of a stream to `take` until that returns true; takes up a broken stream where it broke. */
export async function listen(path, signal, take) {
  let last = null;
  for (let count = 1; ; count++) {
    try {
      const response = await ask(path, { signal, headers: last === null ? {} : { 'Last-Event-ID': last } });
      for await (const { type, id, data } of eventsOf(response)) {
        if (type === 'stopping') break;
        count = 0;
        last = id ?? last;
        if (take(type, data)) return;
      }
    } catch (error) {
      if (error instanceof Refusal || signal.aborted) throw error;
    }
    await pauseAfterLoss(Math.max(count, 1));
    if (signal.aborted) return;
  }
}
