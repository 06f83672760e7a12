// The page of trip-serve: asks for clips, follows them as they are made, and shows the recent ones. All it needs comes
// from the server that sent it. API paths are fetched and shown as blobs, never named in `src`, because <img>, <video>
// and EventSource cannot send the header that carries the key.

import { Live, decoded } from './live.js';
import { askBlob, askJson, listen, newKey, pause, speakThrough } from './server.js';

const at = (id) => document.getElementById(id);

const FINISHED = new Set(['completed', 'failed', 'cancelled']);
const PICTURES = at('file').accept.split(',');
const FIELD_OF_PARAMETER = {
  input_reference: 'file', prompt: 'prompt', model: 'model', seed: 'seed', speed: 'speed',
  num_inference_steps: 'steps', guidance_scale: 'guidance', negative_prompt: 'negative',
};
const STEPS_SHARE = 85; // of the progress bar; decoding has the rest
const MOST_KEPT = 24; // requests whose picture is kept for "again"
const calm = matchMedia('(prefers-reduced-motion: reduce)');

// What is said where

const hints = {};

function setHint(field, text) {
  hints[field] = text;
  if (!at(field).closest('.wrong')) at(`${field}-hint`).textContent = text;
}

function markWrong(field, message) {
  at(`${field}-hint`).textContent = message;
  at(field).closest('.field').classList.add('wrong');
  at(field).setAttribute('aria-invalid', 'true');
  if (at('extras').contains(at(field))) at('extras').open = true;
  if (field === 'model') at('model-field').hidden = false;
  at(field).focus();
}

function markRight(field) {
  at(field).closest('.field').classList.remove('wrong');
  at(field).removeAttribute('aria-invalid');
  at(`${field}-hint`).textContent = hints[field] ?? '';
}

function tellProblem(message) {
  at('problem').textContent = message;
}

/** Shows an error beside the field that it names, or in the status line. */
function tell(error) {
  const field = FIELD_OF_PARAMETER[error.param];
  if (field) markWrong(field, error.message);
  else tellProblem(error.message);
}

let lost = false;
function tellOfLoss(now) {
  if (now === lost) return;
  lost = now;
  tellProblem(now ? 'The server cannot be reached. Trying again…' : '');
}

function askForKey(wasRefused) {
  const form = at('key-form');
  if (wasRefused) at('key-hint').textContent = 'The server does not accept that key. Please try another.';
  form.classList.toggle('wrong', wasRefused);
  form.hidden = false;
  at('key').focus();
  return new Promise((done) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      const key = at('key').value.trim();
      if (!key) return;
      at('key').value = '';
      form.hidden = true;
      done(key);
    };
  });
}

let announced = '';
/** Speaks a change to screen readers once, not every step of it. */
function announce(about, text) {
  if (about === announced) return;
  announced = about;
  at('announcement').textContent = text;
}

function duration(seconds) {
  if (seconds >= 90) return `${Math.round(seconds / 60)} min`;
  if (seconds >= 10) return `${Math.round(seconds)} s`;
  return `${Number(seconds.toPrecision(2))} s`;
}

/** Gives an image or video its content. Each owns its address, so the one before is given back. */
function show(element, blob) {
  if (element.src.startsWith('blob:')) URL.revokeObjectURL(element.src);
  if (blob) element.src = URL.createObjectURL(blob);
  else element.removeAttribute('src');
  if (!blob) element.load?.(); // a video plays on otherwise
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// What a clip is asked for with

let picture = null;
let models = [];
let limits = {};
let sending = false;

async function takePicture(file, name = file.name) {
  if (!PICTURES.includes(file.type)) {
    return markWrong('file', `${name || 'That'} is no PNG, JPEG, WebP, BMP, GIF or TIFF picture.`);
  }
  if (file.size > (limits.upload_bytes ?? Infinity)) {
    const [found, most] = [file.size, limits.upload_bytes].map((bytes) => (bytes / 2 ** 20).toFixed(1));
    return markWrong('file', `${name} has ${found} MB, which is more than ${most} MB. Please choose a smaller file.`);
  }
  // Read now: a file that changes on disk before it is sent would fail as a lost network does.
  const bytes = await file.arrayBuffer().catch(() => null);
  if (!bytes) return markWrong('file', `${name} cannot be read. Please choose another file.`);
  picture = new File([bytes], name, { type: file.type });
  show(at('preview'), picture);
  at('preview').hidden = false;
  at('drop').classList.add('filled');
  setHint('file', name);
  markRight('file');
}

function takeFirst(files) {
  const file = [...files].find(({ type }) => PICTURES.includes(type)) ?? files[0];
  if (file) takePicture(file);
}

async function takeExample({ dataset }) {
  at('prompt').value = dataset.sentence;
  markRight('prompt');
  try {
    await takePicture(await askBlob(`page/examples/${dataset.picture}`, { tries: 3 }), dataset.picture);
  } catch (error) {
    tellProblem(error.message);
  }
}

const chosenModel = () => models.find(({ id }) => id === at('model').value);

function fillSelect(select, names, labels = names) {
  const before = select.value;
  select.replaceChildren(...names.map((name, place) => new Option(labels[place], name)));
  if (names.includes(before)) select.value = before;
}

function showModel() {
  const model = chosenModel();
  if (!model) return;
  fillSelect(at('speed'), Object.keys(model.speeds));
  const [width, height] = model.size.split('x').map(Number);
  at('stage').style.aspectRatio = `${width} / ${height}`;
  const waiting = model.ready ? '' : ', getting ready';
  setHint('model', `${width}×${height}, ${model.num_frames} frames${waiting}`);
  setHint('guidance', `Empty: ${model.guidance_scale}`);
  showSpeed();
}

function showSpeed() {
  const speed = chosenModel()?.speeds[at('speed').value];
  if (!speed) return;
  const time = speed.expected_s ? `, about ${duration(speed.expected_s)}` : '';
  setHint('speed', `${speed.num_inference_steps} steps${time}`);
  setHint('steps', `Empty: ${speed.num_inference_steps}`);
}

async function loadModels() {
  const answer = await askJson('v1/models');
  models = answer.data;
  limits = answer.limits ?? {};
  fillSelect(at('model'), models.map(({ id }) => id));
  at('model-field').hidden = models.length < 2;
  showModel();
  drawView(); // a clip that is shown may go on with its model alone
  if (models.some(({ ready }) => !ready)) setTimeout(() => loadModels().catch(tell), 5000);
}

/** What the form says, by the API's names, without what was left empty. */
function given() {
  const fields = Object.entries(FIELD_OF_PARAMETER).filter(([parameter]) => parameter !== 'input_reference');
  const values = fields.map(([parameter, field]) => [parameter, at(field).value.trim()]);
  return Object.fromEntries(values.filter(([, value]) => value !== ''));
}

function submit(event) {
  event.preventDefault();
  const request = given();
  const most = limits.prompt_characters ?? Infinity;
  const length = [...(request.prompt ?? '')].length;
  if (!picture && !live) markWrong('file', 'Please choose a picture first.');
  else if (!length) markWrong('prompt', 'Please say in a sentence what happens.');
  else if (length > most) markWrong('prompt', `That has ${length} characters; ${most} is the most.`);
  else if (live) sayNext(request.prompt);
  else send(picture, request);
}

async function send(file, request) {
  if (sending) return;
  const body = new FormData();
  for (const [name, value] of Object.entries(request)) body.append(name, value);
  body.append('input_reference', file, file.name);
  const headers = { 'Idempotency-Key': newKey() };
  sending = true;
  at('make').setAttribute('aria-disabled', 'true');
  tellProblem('');
  Object.values(FIELD_OF_PARAMETER).forEach(markRight);
  try {
    const job = await askJson('v1/videos', { method: 'POST', body, headers, tries: 5 });
    asked.set(job.id, { file, request });
    if (asked.size > MOST_KEPT) asked.delete(asked.keys().next().value);
    changes++;
    wall = [job.id, ...wall.filter((id) => id !== job.id)];
    remember(job);
    arrangeWall();
    select(job.id);
    hurry();
  } catch (error) {
    tell(error);
  }
  sending = false;
  at('make').removeAttribute('aria-disabled');
}

// Jobs, and the wall of them

const jobs = new Map(); // id → what was last heard of it
const asked = new Map(); // id → what this page sent for it
const tiles = new Map(); // id → its <li>
const thumbnails = new Map(); // id → a blob, or null while it is on its way or missing
let wall = []; // ids, newest first
let after = null; // the next page's cursor, null where there is none
let changes = 0; // counts what this page added and removed, which lists asked for before do not know

const isActive = (id) => !FINISHED.has(jobs.get(id)?.status);

function remember(job) {
  const known = jobs.get(job.id);
  // What was asked for before a job's end may arrive after it.
  if (FINISHED.has(known?.status) && job.status && !FINISHED.has(job.status)) return;
  jobs.set(job.id, { ...known, ...job });
  if (tiles.has(job.id)) drawTile(job.id);
  if (job.id === selected) drawView();
}

function forget(id) {
  changes++;
  wall = wall.filter((other) => other !== id);
  arrangeWall();
  if (id === selected) select(null);
  for (const map of [jobs, asked, thumbnails]) map.delete(id);
}

function newTile(id) {
  const face = make('span', { className: 'picture' }, make('img', { alt: '' }), make('progress', { max: 100 }));
  const words = [make('span', { className: 'sentence' }), make('span', { className: 'state' })];
  const button = make('button', { type: 'button', className: 'tile', onclick: () => select(id, true) }, face, ...words);
  tiles.set(id, make('li', {}, button));
  drawTile(id);
  return tiles.get(id);
}

function drawTile(id) {
  const job = jobs.get(id);
  const tile = tiles.get(id).firstChild;
  const [image, bar, sentence, state] = tile.querySelectorAll('img, progress, .sentence, .state');
  tile.dataset.status = job.status;
  tile.setAttribute('aria-current', id === selected);
  sentence.textContent = job.prompt;
  state.textContent = shortState(job);
  bar.hidden = job.status !== 'in_progress';
  bar.value = progressOf(job);
  if (!image.src && asked.has(id)) show(image, asked.get(id).file);
  if (job.status === 'completed' && !thumbnails.has(id)) loadThumbnail(id, image);
}

async function loadThumbnail(id, image) {
  thumbnails.set(id, null);
  // Without one the tile keeps its plain ground.
  const blob = await askBlob(`v1/videos/${id}/content?variant=thumbnail`).catch(() => null);
  if (!blob || !tiles.has(id)) return;
  thumbnails.set(id, blob);
  show(image, blob);
}

function arrangeWall() {
  for (const [id, tile] of tiles) {
    if (wall.includes(id)) continue;
    show(tile.querySelector('img'), null);
    tile.remove();
    tiles.delete(id);
    thumbnails.delete(id);
  }
  wall.forEach((id, place) => {
    const tile = tiles.get(id) ?? newTile(id);
    const there = at('wall').children[place];
    // Moved only where it must be: an element that moves loses the focus.
    if (there !== tile) at('wall').insertBefore(tile, there ?? null);
  });
  at('no-clips').hidden = wall.length > 0;
  at('more').hidden = after === null;
}

async function askPage(query = '') {
  const page = await askJson(`v1/videos?limit=24&order=desc${query}`);
  return { ...page, data: page.data.filter(({ id }) => !passing.has(id)) };
}

function rememberPage({ data }) {
  // Its own stream is ahead of any list.
  for (const job of data) if (job.id !== followed) remember(job);
}

async function refreshWall() {
  const before = changes;
  const page = await askPage();
  if (changes !== before) return;
  rememberPage(page);
  const overlap = wall.indexOf(page.last_id);
  const older = overlap < 0 ? [] : wall.slice(overlap + 1);
  if (!older.length) after = page.has_more ? page.last_id : null;
  wall = [...page.data.map(({ id }) => id), ...older];
  arrangeWall();
}

async function showMore() {
  const before = changes;
  try {
    const page = await askPage(`&after=${encodeURIComponent(after)}`);
    if (changes !== before) return;
    const focused = document.activeElement === at('more');
    const [first] = page.data;
    rememberPage(page);
    wall = [...new Set([...wall, ...page.data.map(({ id }) => id)])];
    after = page.has_more ? page.last_id : null;
    arrangeWall();
    if (focused && first) tiles.get(first.id).firstChild.focus({ preventScroll: true });
  } catch (error) {
    tell(error);
  }
}

let hurry = () => {};
async function keepWallFresh() {
  for (;;) {
    await refreshWall().catch(tell);
    const busy = wall.some((id) => id !== followed && isActive(id));
    await new Promise((done) => {
      hurry = done;
      setTimeout(done, busy ? 1500 : 20000);
    });
    if (document.hidden) await new Promise((done) => addEventListener('visibilitychange', done, { once: true }));
  }
}

// The main view

let selected = null;
let followed = null;
let leaving = new AbortController();

async function select(id, move = false) {
  live?.stop();
  live = null;
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const before = selected;
  [selected, followed] = [id, null];
  if (id) sessionStorage.setItem('clip', id);
  else sessionStorage.removeItem('clip');
  for (const other of [before, id]) if (tiles.has(other)) drawTile(other);
  show(at('clip'), null);
  show(at('still'), asked.get(id)?.file ?? thumbnails.get(id));
  at('stage').dataset.state = id ? 'waiting' : 'empty';
  at('download').removeAttribute('href');
  tellProblem('');
  drawView();
  if (!id) return;
  if (move || isActive(id)) {
    at('stage').scrollIntoView({ block: 'nearest', behavior: calm.matches ? 'auto' : 'smooth' });
  }
  try {
    if (isActive(id)) await follow(id, signal);
    if (jobs.get(id)?.status === 'completed') await play(id, signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 404) forget(id);
    tell(error);
  }
}

async function follow(id, signal) {
  followed = id;
  const frames = drawFrames(id, signal);
  await listen(`v1/videos/${id}/events`, signal, (type, data) => {
    if (type === 'deleted') forget(id);
    else if (FINISHED.has(type)) remember(data);
    else if (type === 'queued') remember({ id, status: 'queued', queue: data });
    else if (type === 'decoding') remember({ id, status: 'in_progress', decoding: data });
    else remember({ id, status: 'in_progress', queue: null, decoding: null, expected_s: null, ...data });
    return type === 'deleted' || FINISHED.has(type);
  });
  if (followed === id) followed = null;
  // The last frames may be on their way still; a stream of them that hangs does not keep the clip back.
  if (jobs.get(id)?.status === 'completed') await Promise.race([frames, pause(1)]);
}

/** Draws the frames of a clip as they are decoded. Without them the view has its status still. */
async function drawFrames(id, signal) {
  let drawn = Promise.resolve();
  try {
    await listen(`v1/videos/${id}/frames`, signal, (type, data) => {
      if (type === 'restart') at('stage').dataset.state = 'waiting';
      if (type === 'frame') drawn = drawn.then(() => drawFrame(data, signal));
      return type === 'end';
    });
    await drawn;
  } catch {
    // Refused or left.
  }
}

async function drawFrame({ png }, signal) {
  const image = await decoded(png);
  if (!signal.aborted && at('stage').dataset.state !== 'clip') paint(image);
}

/** Shows a frame on the stage. */
function paint(image) {
  const canvas = at('frames');
  if (canvas.width !== image.naturalWidth) canvas.width = image.naturalWidth;
  if (canvas.height !== image.naturalHeight) canvas.height = image.naturalHeight;
  canvas.classList.toggle('small', image.naturalWidth < 128);
  canvas.getContext('2d').drawImage(image, 0, 0);
  at('stage').dataset.state = 'frames';
}

async function play(id, signal) {
  const blob = await askBlob(`v1/videos/${id}/content?variant=video`, { signal });
  const clip = at('clip');
  show(clip, blob);
  at('download').href = clip.src;
  at('download').download = fileName(jobs.get(id));
  drawView();
  await new Promise((done, fail) => {
    clip.onloadeddata = done;
    clip.onerror = () => fail(new Error('This browser cannot play the clip. You can download it.'));
  });
  if (!signal.aborted) at('stage').dataset.state = 'clip';
}

function fileName({ prompt, seed }) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 60).replace(/^-+|-+$/g, '');
  return `${words || 'clip'}-${seed}.mp4`;
}

function progressOf({ status, steps_done: done, steps, decoding }) {
  if (status === 'completed') return 100;
  if (decoding) return STEPS_SHARE + (100 - STEPS_SHARE) * (decoding.frames_done / decoding.num_frames);
  return status === 'in_progress' && steps ? STEPS_SHARE * (done / steps) : 0;
}

function shortState({ status, queue, steps_done: done, steps, decoding }) {
  if (status === 'queued') return queue ? `Queued, place ${queue.position + 1}` : 'Queued';
  if (status === 'in_progress') return decoding ? 'Decoding' : `Step ${done} of ${steps}`;
  return { failed: 'Failed', cancelled: 'Cancelled' }[status] ?? '';
}

function longState(job) {
  const { status, queue, steps_done: done, steps, decoding, expected_s: left } = job;
  if (status === 'queued' && queue) {
    const wait = queue.expected_wait_s == null ? '' : `, about ${duration(queue.expected_wait_s)} to wait`;
    return `Place ${queue.position + 1} in the queue${wait}`;
  }
  if (decoding && status === 'in_progress') return `Decoding frame ${decoding.frames_done} of ${decoding.num_frames}`;
  if (status === 'in_progress' && !done) return 'Started';
  if (status === 'in_progress') return `Step ${done} of ${steps}${left ? `, about ${duration(left)} left` : ''}`;
  if (status === 'completed') return job.inference_time_s ? `Made in ${duration(job.inference_time_s)}` : 'Done';
  return { queued: 'In the queue', failed: '', cancelled: 'Cancelled' }[status];
}

const nameOf = (engine) => [engine?.backend, engine?.device, engine?.arithmetic].filter(Boolean).join(', ');

function figures(parity) {
  const isFigure = ([name, value]) => typeof value === 'number' && !name.startsWith('num_');
  const known = Object.entries(parity ?? {}).filter(isFigure);
  const words = (name) => name.replaceAll('_', ' ').replace('psnr', 'PSNR');
  return known.map(([name, value]) => `${words(name)} ${Number(value.toPrecision(4))}`).join(', ');
}

function drawFacts(job) {
  const facts = [
    ['Seed', job.seed, 'half'], ['Speed', job.speed], ['Steps', job.num_inference_steps],
    ['Engine', nameOf(job.engine), 'half'], ['Guidance', job.guidance_scale],
    ['Took', job.inference_time_s && duration(job.inference_time_s)], ['Parity', figures(job.parity), 'whole'],
  ];
  if (models.length > 1) facts.push(['Model', job.model, 'whole']);
  if (job.negative_prompt) facts.push(['Not to show', job.negative_prompt, 'whole']);
  at('facts').replaceChildren(...facts.map(([name, value, className = '']) => make(
    'div', { className },
    make('dt', { textContent: name }), make('dd', { textContent: value || value === 0 ? value : '–' }),
  )));
  at('sentence').textContent = live?.prompt ?? job.prompt ?? '';
  at('warnings').replaceChildren(...(job.warnings ?? []).map((textContent) => make('li', { textContent })));
}

function drawView() {
  const job = jobs.get(selected) ?? {};
  const active = Boolean(selected) && isActive(selected);
  const text = live ? 'Playing on. Say what happens next.' : selected ? longState(job) ?? '' : '';
  at('state').textContent = text;
  const about = [selected, job.status, Boolean(job.decoding), Boolean(live)].join(' ');
  announce(about, job.decoding && active ? 'Decoding' : text);
  at('progress').classList.toggle('idle', !active);
  at('progress').value = progressOf(job);
  const focused = document.activeElement;
  at('cancel').hidden = !active;
  at('download').hidden = !at('download').href;
  at('again').hidden = at('delete').hidden = !selected || active || Boolean(live);
  at('live').hidden = !live && !canGoOn(job);
  at('live').textContent = live ? 'Stop' : 'Keep going';
  at('make').textContent = live ? 'Say it' : 'Make clip';
  // The focus must not fall off the page with a button that goes.
  if (focused?.hidden) at('view').focus({ preventScroll: true });
  if (job.status === 'failed') tellProblem(job.error?.message ?? 'The clip could not be made.');
  drawFacts(job);
}

async function cancel() {
  const id = selected;
  try {
    remember(await askJson(`v1/videos/${id}/cancel`, { method: 'POST' }));
  } catch (error) {
    tell(error);
  }
}

async function remove() {
  const id = selected;
  try {
    await askJson(`v1/videos/${id}`, { method: 'DELETE' });
    forget(id);
  } catch (error) {
    if (error.status === 404) forget(id);
    tell(error);
  }
}

/** The server gives no picture back, so for a clip that this page did not ask for the person has to. */
function again() {
  const known = asked.get(selected);
  if (known) {
    const { seed, ...others } = known.request;
    send(known.file, others);
    return;
  }
  const job = jobs.get(selected);
  if (models.some(({ id }) => id === job.model)) at('model').value = job.model;
  showModel();
  at('prompt').value = job.prompt;
  at('speed').value = job.speed;
  at('seed').value = '';
  at('negative').value = job.negative_prompt ?? '';
  const usual = chosenModel()?.speeds[job.speed]?.num_inference_steps;
  at('steps').value = job.num_inference_steps === usual ? '' : job.num_inference_steps;
  at('guidance').value = job.guidance_scale === chosenModel()?.guidance_scale ? '' : job.guidance_scale;
  showSpeed();
  markWrong('file', 'The settings are filled in. Please choose the picture of that clip, then make it.');
}

// Clips without an end

let live = null;
const passing = new Set(); // the clips that a live one is made of, which the wall does not show

const modelOf = (job) => models.find(({ id }) => id === job.model);

function canGoOn(job) {
  const model = modelOf(job);
  return job.status === 'completed' && Boolean(at('download').href) && job.size === model?.size && model.num_frames > 1;
}

async function keepGoing() {
  const job = jobs.get(selected);
  const model = modelOf(job);
  const { prompt, seed, model: chosen, ...fields } = given();
  leaving.abort(); // a video that is still on its way
  leaving = new AbortController();
  at('clip').pause();
  tellProblem('');
  const mine = live = new Live({
    id: job.id, prompt: job.prompt, fields, fps: job.fps, draw: paint, own: keepFromWall,
    window: model.num_frames - 1, takes: 1000 * (model.speeds[fields.speed]?.expected_s || 1),
  });
  drawView();
  const problem = await mine.play().then(() => null, (error) => error);
  if (live !== mine) return;
  live = null;
  at('stage').dataset.state = 'clip';
  if (!calm.matches) at('clip').play().catch(() => {}); // which a browser may not want to
  drawView();
  if (problem) tell(problem);
}

function keepFromWall(id) {
  passing.add(id);
  changes++;
  if (!wall.includes(id)) return;
  wall = wall.filter((other) => other !== id);
  arrangeWall();
}

function sayNext(prompt) {
  live.say(prompt);
  drawView();
}

async function takeUpWhatRan() {
  const id = sessionStorage.getItem('clip');
  if (!id) return;
  try {
    remember(await askJson(`v1/videos/${id}`));
    if (!selected) select(id);
  } catch (error) {
    sessionStorage.removeItem('clip');
    if (error.status !== 404) tell(error);
  }
}

// What a person does

at('clip').autoplay = !calm.matches;
at('composer').onsubmit = submit;
at('file').onchange = ({ target }) => {
  takeFirst(target.files);
  target.value = ''; // the same file chosen again is a change too
};
for (const button of document.querySelectorAll('.example')) button.onclick = () => takeExample(button);
for (const field of Object.values(FIELD_OF_PARAMETER)) at(field).addEventListener('input', () => markRight(field));
at('model').onchange = showModel;
at('speed').onchange = showSpeed;
at('prompt').onkeydown = (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
};
at('cancel').onclick = cancel;
at('live').onclick = () => (live ? live.stop() : keepGoing());
addEventListener('pagehide', () => live?.stop());
at('again').onclick = again;
at('delete').onclick = remove;
at('more').onclick = showMore;

// The whole page takes a drop, as a picture dropped beside the box would replace the page otherwise.
const carriesFiles = ({ dataTransfer }) => dataTransfer.types.includes('Files');
document.ondragover = (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  at('drop').classList.add('over');
};
document.ondragleave = ({ relatedTarget }) => {
  if (!relatedTarget) at('drop').classList.remove('over');
};
document.ondrop = (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  at('drop').classList.remove('over');
  takeFirst(event.dataTransfer.files);
};
document.onpaste = (event) => {
  const { files, types } = event.clipboardData;
  // Words copied from a document often come with a picture of themselves.
  if (!files.length || (types.includes('text/plain') && event.target.matches('input, textarea'))) return;
  event.preventDefault();
  takeFirst(files);
};
// Pictures below 128 pixels stay crisp when they are enlarged.
for (const type of ['load', 'loadedmetadata']) {
  document.addEventListener(type, ({ target }) => {
    target.classList?.toggle('small', (target.naturalWidth ?? target.videoWidth) < 128);
  }, true);
}
at('preview').onerror = () => {
  at('preview').hidden = true;
  at('drop').classList.remove('filled');
};

speakThrough({ tellOfLoss, askForKey });
drawView();
loadModels().catch(tell);
takeUpWhatRan();
keepWallFresh();
