// A clip without an end: its frames are shown at their times while those that follow are asked for, a window at a time,
// each an extension that goes on from a frame of the one before.

import { askJson, listen, newKey, pause } from './server.js';

/** A picture of base64. */
export async function decoded(png) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  return image;
}

export class Live {
  #waiting = []; // frames to be shown: their image, and which frame (`index`) of which clip (`id`) each is
  #last = null; // the frame shown last
  #shown = 0; // frames that have left #waiting
  #due = 0; // when the next one should, in milliseconds
  #said = 0; // sentences so far
  #madeFor = 0; // the newest of them with frames
  #making = null; // the extension that is asked for, and `left` once nobody waits for it
  #mine = new Set(); // extensions that are not deleted yet
  #ending = new AbortController();
  #waking = [];

  /** Goes on from the completed clip `id`, by `prompt` at first and with the settings `fields`. `window` is how many
   * frames are made at once, `takes` in how many milliseconds they are expected. `draw(image)` shows a frame, `own(id)`
   * hears of every extension. */
  constructor({ id, prompt, fields, fps, window, takes, draw, own }) {
    Object.assign(this, { id, prompt, fields, fps, window, takes, draw, own });
  }

  /** Plays until `stop`; throws what goes wrong. No extension is left either way. */
  async play() {
    const { signal } = this.#ending;
    try {
      await this.#take(this.id, signal, (frame) => this.#waiting.push(frame));
      await Promise.all([this.#show(), this.#make()]);
    } catch (error) {
      if (!signal.aborted) throw error;
    } finally {
      this.stop();
    }
  }

  /** Goes on by another sentence as soon as it can be. */
  say(prompt) {
    this.prompt = prompt;
    this.#said++;
    // What is on its way is given up, unless nothing else is left to be shown or frames of it have come: then its clip
    // is nearly done, and the next one can go on from it.
    if (this.#waiting.length && !this.#making?.came) this.#making?.left.abort();
    this.#wake();
  }

  stop() {
    this.#ending.abort();
    this.#making?.left.abort();
    this.#wake();
    this.#mine.forEach((id) => this.#remove(id));
  }

  async #show() {
    this.#due = performance.now();
    while (!this.#ending.signal.aborted) {
      await pause(Math.max(0, this.#due - performance.now()) / 1000);
      if (!this.#waiting.length) {
        await this.#change();
        this.#due = Math.max(this.#due, performance.now());
        continue;
      }
      if (this.#ending.signal.aborted) return;
      this.#last = this.#waiting.shift();
      this.#shown++;
      this.draw(this.#last.image);
      // A tab that slept does not make up for it.
      this.#due = Math.max(this.#due, performance.now() - 1000 / this.fps) + 1000 / this.fps;
      this.#tidy();
      this.#wake();
    }
  }

  async #make() {
    while (!this.#ending.signal.aborted) {
      if (this.#said > this.#madeFor || this.#waiting.length <= this.window) await this.#makeWindow();
      else await this.#change();
    }
  }

  async #makeWindow() {
    const said = this.#said;
    let kept = this.#waiting.length;
    if (said > this.#madeFor) { // as many as are shown until the new ones are there
      const ready = performance.now() + this.takes;
      kept = Math.min(kept, Math.max(0, Math.ceil((ready - this.#due) * this.fps / 1000)));
    }
    const origin = kept ? this.#waiting[kept - 1] : this.#last ?? this.#waiting[0];
    const cut = this.#shown + kept;
    const making = this.#making = { left: new AbortController(), origin: origin.id, came: false };
    const began = performance.now();
    const body = { ...this.fields, prompt: this.prompt, video: { id: origin.id }, from_frame: origin.index };
    const headers = { 'Content-Type': 'application/json', 'Idempotency-Key': newKey() };
    // Not left half way: only its answer says which job there is to delete.
    const { id } = await askJson('v1/videos/extensions', {
      method: 'POST', headers, body: JSON.stringify(body), tries: 5,
    });
    this.#mine.add(id);
    this.own(id);
    making.id = id;
    try {
      making.left.signal.throwIfAborted();
      await this.#take(id, making.left.signal, (frame) => {
        if (making.left.signal.aborted) return;
        if (!making.came) {
          making.came = true;
          this.takes = Math.max(performance.now() - began, 0.9 * this.takes);
          // Where it took longer than it used to, a frame or two are shown once more in another way.
          while (this.#waiting.length > Math.max(0, cut - this.#shown)) this.#waiting.pop();
          this.#madeFor = said;
        }
        this.#waiting.push(frame);
        this.#wake();
      });
    } catch (error) {
      if (!making.left.signal.aborted) throw error;
    } finally {
      this.#making = null;
      if (this.#ending.signal.aborted) this.#remove(id);
      else this.#tidy();
    }
  }

  /** Hands on the frames of a clip as they come, until it is completed; throws where it will not be. */
  async #take(id, signal, push) {
    let count = 0;
    let ended = '';
    let handed = Promise.resolve();
    await listen(`v1/videos/${id}/frames`, signal, (type, data) => {
      // A clip that is begun anew, or a stream that broke, begins with frames that have come already.
      if (type === 'frame' && data.index === count) {
        count++;
        handed = handed.then(async () => push({ image: await decoded(data.png), id, index: data.index }));
        handed.catch(() => {}); // it is awaited below
      }
      if (type === 'end') ended = data.status;
      return type === 'end';
    });
    await handed;
    signal.throwIfAborted();
    if (ended === 'completed') return;
    const job = await askJson(`v1/videos/${id}`, { tries: 3 });
    throw new Error(job.error?.message ?? `The next frames were not made: ${ended}.`);
  }

  /** Deletes the extensions of which no frame is needed any more. */
  #tidy() {
    const needed = new Set([...this.#waiting, this.#last].map((frame) => frame?.id));
    for (const id of this.#mine) {
      if (!needed.has(id) && id !== this.#making?.id && id !== this.#making?.origin) this.#remove(id);
    }
  }

  #remove(id) {
    this.#mine.delete(id);
    // What cannot be deleted now expires. The request outlives the page, which may be closing.
    askJson(`v1/videos/${id}`, { method: 'DELETE', keepalive: true, tries: 2 }).catch(() => {});
  }

  #wake() {
    this.#waking.splice(0).forEach((done) => done());
  }

  #change() {
    return new Promise((done) => this.#waking.push(done));
  }
}
