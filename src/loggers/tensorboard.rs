use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use serde_json::{Value, json};

use super::append::{AppendFile, lock, locked, now};
use super::protobuf::Message;
use super::{Histogram, Image, Logger, logger_as_handler};
use crate::engine::Log;
use crate::error::{Error, Result};
use crate::fs::make_folder;

/// A logger that writes an event file for TensorBoard: `tensorboard --logdir FOLDER`.
///
/// Clones share one file, and so do loggers of the same folder in one process. See [`loggers`](super) for when values
/// are on the disk. A scalar costs some 100 bytes, and usually no system call.
///
/// Each process writes its own file in the folder. When an engine is resumed, the files of earlier processes are cut
/// where the checkpoint was written, and files from after it are removed. The new file begins with TensorBoard's mark
/// of a restart (`SessionLog.START`), which makes a running server forget the later steps. In a folder with other runs,
/// a run that starts anew writes the same mark at step 0, which hides these runs; give each run a folder of its own to
/// compare them.
///
/// TensorBoard stores scalars in f32.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::loggers::{Histogram, Image, Logger, TensorBoard};
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-tensorboard-{}", std::process::id()));
/// let board = TensorBoard::create(&folder)?;
/// board.scalar("loss", 0.5, 1)?;
/// board.histogram("noise", &Histogram::of(&Tensor::randn([100], (Kind::Float, Device::Cpu)))?, 1)?;
/// board.text("note", "**bold**, and what else Markdown has", 1)?;
/// board.image("grey", &Image::from_tensor(&(Tensor::ones([28, 28], (Kind::Float, Device::Cpu)) * 0.5))?, 1)?;
/// board.hparams([("lr", 0.1.into()), ("optimizer", "sgd".into())], ["val/accuracy"])?;
/// # drop(board);
/// # std::fs::remove_dir_all(folder).ok();
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Clone)]
pub struct TensorBoard {
    board: Arc<Mutex<Board>>,
}

crate::debug::opaque_debug!(TensorBoard);

/// The event files of a run in a folder. The last one is open.
struct Board {
    /// The path as the user gave it.
    folder: PathBuf,
    /// The absolute path.
    place: PathBuf,
    file: AppendFile,
    /// Length of the version record, which every event file begins with.
    head: u64,
    /// Identifies the files of this run: the numbers in the name of its first file.
    chain: String,
    /// The files of earlier processes of this run, with their lengths.
    earlier: BTreeMap<String, u64>,
    /// The largest step of all events.
    last_step: Option<u64>,
    /// Whether it is known which run the file belongs to.
    settled: bool,
}

static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<Mutex<Board>>>>> = LazyLock::new(Mutex::default);

const PREFIX: &str = "events.out.tfevents.";

/// The value of a hyper-parameter, for [`TensorBoard::hparams`].
#[derive(Debug, Clone, PartialEq)]
pub enum HyperParameter {
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
    /// A switch.
    Switch(bool),
}

impl From<f64> for HyperParameter {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

impl From<&str> for HyperParameter {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<bool> for HyperParameter {
    fn from(value: bool) -> Self {
        Self::Switch(value)
    }
}

/// Numbers of fields and enums in TensorBoard's .proto files.
mod field {
    pub(super) const EVENT_WALL_TIME: u64 = 1;
    pub(super) const EVENT_STEP: u64 = 2;
    pub(super) const EVENT_FILE_VERSION: u64 = 3;
    pub(super) const EVENT_SUMMARY: u64 = 5;
    pub(super) const EVENT_SESSION_LOG: u64 = 7;
    pub(super) const SESSION_STATUS: u64 = 1;
    pub(super) const SESSION_START: u64 = 1;
    pub(super) const SUMMARY_VALUE: u64 = 1;
    pub(super) const VALUE_TAG: u64 = 1;
    pub(super) const VALUE_SIMPLE_VALUE: u64 = 2;
    pub(super) const VALUE_IMAGE: u64 = 4;
    pub(super) const VALUE_HISTO: u64 = 5;
    pub(super) const VALUE_TENSOR: u64 = 8;
    pub(super) const VALUE_METADATA: u64 = 9;
    pub(super) const METADATA_PLUGIN_DATA: u64 = 1;
    pub(super) const PLUGIN_NAME: u64 = 1;
    pub(super) const PLUGIN_CONTENT: u64 = 2;
    pub(super) const TENSOR_DTYPE: u64 = 1;
    pub(super) const TENSOR_SHAPE: u64 = 2;
    pub(super) const TENSOR_STRING_VAL: u64 = 8;
    pub(super) const SHAPE_DIM: u64 = 2;
    pub(super) const DIM_SIZE: u64 = 1;
    pub(super) const DT_STRING: u64 = 7;
    pub(super) const HPARAMS_EXPERIMENT: u64 = 2;
    pub(super) const HPARAMS_SESSION_START: u64 = 3;
    pub(super) const EXPERIMENT_TIME: u64 = 3;
    pub(super) const EXPERIMENT_HPARAM: u64 = 4;
    pub(super) const EXPERIMENT_METRIC: u64 = 5;
    pub(super) const START_HPARAMS: u64 = 1;
    pub(super) const START_TIME: u64 = 5;
}

/// The masked CRC-32C of TFRecord files, rotated and shifted so that the CRC of data that holds CRCs is sound.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Encodes a record of a TFRecord file.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

fn plugin(name: &str, content: Message) -> Message {
    let data = Message::new().string(field::PLUGIN_NAME, name);
    let data = data.message(field::PLUGIN_CONTENT, content);
    Message::new().message(field::METADATA_PLUGIN_DATA, data)
}

/// The numbers in the name of an event file of this crate: seconds, process, and number within the process.
fn numbers(name: &str) -> Option<[&str; 3]> {
    let mut parts = name.strip_prefix(PREFIX)?.split('.');
    let numbers = [parts.next()?, parts.next()?, parts.next()?];
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_ours = numbers.iter().all(|number| digits(number))
        && parts.next().is_none_or(|chain| chain.split('-').all(digits))
        && parts.next().is_none();
    is_ours.then_some(numbers)
}

/// The seconds in the name of any event file.
fn seconds(name: &str) -> Option<u64> {
    let seconds = name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()?;
    // A larger number is not a time, and no later name could follow it.
    (seconds < 9_999_999_999).then_some(seconds)
}

/// The names of all event files in a folder.
fn event_files(folder: &Path) -> Result<Vec<String>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let mut names = vec![];
    for entry in fs::read_dir(folder).map_err(io)? {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    names.retain(|name| name.starts_with(PREFIX));
    Ok(names)
}

/// The mark of a restart: events of this step and later ones no longer count.
fn restart(step: u64) -> Vec<u8> {
    let start = Message::new().uint(field::SESSION_STATUS, field::SESSION_START);
    let event = Message::new().double(field::EVENT_WALL_TIME, now()).uint(field::EVENT_STEP, step);
    record(&event.message(field::EVENT_SESSION_LOG, start).into_bytes())
}

impl Board {
    fn create(folder: &Path, place: PathBuf) -> Result<Self> {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let begun = now();
        // TensorBoard reads the files of a folder in the order of their names.
        let newest = event_files(&place)?.iter().filter_map(|name| seconds(name)).max();
        let time = (begun as u64).max(newest.map_or(0, |newest| newest + 1));
        let (file, chain) = loop {
            let number = FILES.fetch_add(1, Ordering::Relaxed);
            let (id, name) = (std::process::id(), format!("{PREFIX}{time:010}"));
            if let Some(file) = AppendFile::create(&folder.join(format!("{name}.{id}.{number}")))? {
                break (file, format!("{time:010}-{id}-{number}"));
            }
        };
        let earlier = BTreeMap::new();
        let folder = folder.to_owned();
        let mut board =
            Self { folder, place, file, head: 0, chain, earlier, last_step: None, settled: false };
        let event = Message::new().double(field::EVENT_WALL_TIME, begun);
        board.write(event.string(field::EVENT_FILE_VERSION, "brain.Event:2"))?;
        board.file.flush()?;
        board.head = board.file.len();
        Ok(board)
    }

    fn write(&mut self, event: Message) -> Result<()> {
        self.file.write(&record(&event.into_bytes()))
    }

    fn name(&self) -> String {
        let name = self.file.place().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn begin(&mut self, anew: bool) -> Result<()> {
        if std::mem::replace(&mut self.settled, true) || !anew {
            return Ok(());
        }
        let own = self.name();
        let others = event_files(&self.place)?;
        if others.iter().any(|name| *name != own && numbers(name).is_some()) {
            // The mark goes before the events that were logged until now.
            let tail = self.file.tail(self.head)?;
            self.file.cut(self.head)?;
            self.file.write(&restart(0))?;
            self.file.write(&tail)?;
            self.file.flush()?;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<Value> {
        self.file.sync()?;
        let mut files = self.earlier.clone();
        files.insert(self.name(), self.file.len());
        Ok(json!({"run": self.chain, "files": files, "last step": self.last_step}))
    }

    fn rewind(&mut self, place: &Value) -> Result<Option<String>> {
        let of_others = || Ok(Some("the checkpoint has no place in event files".into()));
        let (Some(chain), Some(files)) = (place["run"].as_str(), place["files"].as_object()) else {
            return of_others();
        };
        let mut kept = BTreeMap::new();
        for (name, bytes) in files {
            match bytes.as_u64() {
                // Listed files are cut, so no name may lead out of the folder.
                Some(bytes) if numbers(name).is_some() => kept.insert(name.clone(), bytes),
                _ => return of_others(),
            };
        }
        self.settled = true;
        let path = |name: &str| self.place.join(name);
        let has = |(name, bytes): (&String, &u64)| {
            fs::metadata(path(name)).is_ok_and(|file| file.is_file() && file.len() >= *bytes)
        };
        if !kept.iter().all(has) {
            return Ok(Some(format!(
                "{} has not the event files that the checkpoint's run had logged to",
                self.folder.display()
            )));
        }
        self.file.flush()?;
        let (own, suffix) = (self.name(), format!(".{chain}"));
        let after: Vec<_> = event_files(&self.place)?
            .into_iter()
            .filter(|name| numbers(name).is_some() && name.ends_with(&suffix))
            .filter(|name| *name != own && !kept.contains_key(name))
            .collect();
        // All files are locked before any is changed.
        let mut cuts = vec![];
        for (name, bytes) in kept.iter().filter(|(name, _)| **name != own) {
            cuts.push((path(name), Some(*bytes)));
        }
        cuts.extend(after.iter().map(|name| (path(name), None)));
        let mut locks = vec![];
        for (path, _) in &cuts {
            let io = |source| Error::Io { path: path.clone(), source };
            let file = OpenOptions::new().append(true).open(path).map_err(io)?;
            lock(&file, path)?;
            locks.push(file);
        }
        for ((path, bytes), file) in cuts.iter().zip(&locks) {
            let done = match bytes {
                Some(bytes) => file.set_len(*bytes).and_then(|()| file.sync_data()),
                None => fs::remove_file(path),
            };
            done.map_err(|source| Error::Io { path: path.clone(), source })?;
        }
        let last_step = place["last step"].as_u64();
        match kept.remove(&own) {
            Some(bytes) => self.file.cut(bytes)?,
            None => {
                // The events that this process logged before belong to the part of the run that is repeated.
                self.file.cut(self.head)?;
                let newest = kept.keys().filter_map(|name| seconds(name)).max();
                let time = (now() as u64).max(newest.map_or(0, |newest| newest + 1));
                if let Some([_, id, number]) = numbers(&own) {
                    let name = format!("{PREFIX}{time:010}.{id}.{number}{suffix}");
                    self.file.rename(&name)?;
                }
            }
        }
        (self.chain, self.earlier, self.last_step) = (chain.to_owned(), kept, last_step);
        self.file.write(&restart(last_step.map_or(0, |step| step.saturating_add(1))))?;
        self.file.flush()?;
        Ok(None)
    }
}

impl TensorBoard {
    /// Makes an event file in this folder, and the folder where it is missing. Where this process writes to the folder
    /// already, the open file is shared.
    ///
    /// # Errors
    /// The folder or file cannot be made; the text has the path.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let io = |source| Error::Io { path: folder.to_owned(), source };
        make_folder(folder).map_err(io)?;
        let name = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let place = fs::canonicalize(name).map_err(io)?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, board| board.strong_count() > 0);
        // An event file that was removed is still open here.
        if let Some(board) = open.get(&place).and_then(Weak::upgrade)
            && locked(&board).file.is_in_place()
        {
            return Ok(Self { board });
        }
        let board = Arc::new(Mutex::new(Board::create(folder, place.clone())?));
        open.insert(place, Arc::downgrade(&board));
        Ok(Self { board })
    }

    fn value(&self, tag: &str, step: u64, with: impl FnOnce(Message) -> Message) -> Result<()> {
        let value = with(Message::new().string(field::VALUE_TAG, tag));
        let summary = Message::new().message(field::SUMMARY_VALUE, value);
        let event = Message::new().double(field::EVENT_WALL_TIME, now());
        let event = event.uint(field::EVENT_STEP, step);
        let mut board = locked(&self.board);
        board.last_step = board.last_step.max(Some(step));
        board.write(event.message(field::EVENT_SUMMARY, summary))
    }

    /// Writes the values by which TensorBoard's HPARAMS page compares runs: the hyper-parameters of this run, and the
    /// tags of the metrics to show beside them, which have to be logged as scalars.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn hparams<'p>(
        &self,
        parameters: impl IntoIterator<Item = (&'p str, HyperParameter)>,
        metrics: impl IntoIterator<Item = &'p str>,
    ) -> Result<()> {
        let begun = now();
        let mut experiment = Message::new().double(field::EXPERIMENT_TIME, begun);
        let mut session = Message::new();
        for (name, parameter) in parameters {
            // The field numbers are those of HParamInfo's DataType and of google.protobuf.Value.
            let (kind, value) = match parameter {
                HyperParameter::Text(text) => (1, Message::new().string(3, &text)),
                HyperParameter::Switch(on) => (2, Message::new().uint(4, on.into())),
                HyperParameter::Number(number) => (3, Message::new().double(2, number)),
            };
            let info = Message::new().string(1, name).uint(4, kind);
            experiment = experiment.message(field::EXPERIMENT_HPARAM, info);
            let entry = Message::new().string(1, name).message(2, value);
            session = session.message(field::START_HPARAMS, entry);
        }
        for tag in metrics {
            let name = Message::new().string(2, tag);
            experiment =
                experiment.message(field::EXPERIMENT_METRIC, Message::new().message(1, name));
        }
        session = session.double(field::START_TIME, begun);
        for (tag, number, message) in [
            ("_hparams_/experiment", field::HPARAMS_EXPERIMENT, experiment),
            ("_hparams_/session_start_info", field::HPARAMS_SESSION_START, session),
        ] {
            let metadata = plugin("hparams", Message::new().message(number, message));
            self.value(tag, 0, |value| value.message(field::VALUE_METADATA, metadata))?;
        }
        Ok(())
    }
}

impl Logger for TensorBoard {
    fn scalar(&self, tag: &str, value: f64, step: u64) -> Result<()> {
        self.value(tag, step, |message| message.float(field::VALUE_SIMPLE_VALUE, value as f32))
    }

    fn histogram(&self, tag: &str, values: &Histogram, step: u64) -> Result<()> {
        let (limits, counts): (Vec<_>, Vec<_>) = values.bins.iter().copied().unzip();
        let histo = Message::new()
            .double(1, values.min)
            .double(2, values.max)
            .double(3, values.count as f64)
            .double(4, values.sum)
            .double(5, values.sum_squares)
            .doubles(6, &limits)
            .doubles(7, &counts);
        self.value(tag, step, |message| message.message(field::VALUE_HISTO, histo))
    }

    /// TensorBoard shows the text as Markdown, under PyTorch's tag `TAG/text_summary`.
    fn text(&self, tag: &str, text: &str, step: u64) -> Result<()> {
        let dim = Message::new().uint(field::DIM_SIZE, 1);
        let tensor = Message::new()
            .uint(field::TENSOR_DTYPE, field::DT_STRING)
            .message(field::TENSOR_SHAPE, Message::new().message(field::SHAPE_DIM, dim))
            .string(field::TENSOR_STRING_VAL, text);
        self.value(&format!("{tag}/text_summary"), step, |message| {
            message
                .message(field::VALUE_TENSOR, tensor)
                .message(field::VALUE_METADATA, plugin("text", Message::new()))
        })
    }

    fn image(&self, tag: &str, image: &Image, step: u64) -> Result<()> {
        let picture = Message::new()
            .uint(1, image.height.into())
            .uint(2, image.width.into())
            .uint(3, image.channels.into())
            .bytes(4, &image.png);
        self.value(tag, step, |message| message.message(field::VALUE_IMAGE, picture))
    }

    fn flush(&self) -> Result<()> {
        locked(&self.board).file.flush()
    }

    fn begin(&self, anew: bool) -> Result<()> {
        locked(&self.board).begin(anew)
    }

    fn logs(&self) -> Vec<Rc<dyn Log>> {
        vec![Rc::new(self.clone())]
    }
}

impl Log for TensorBoard {
    fn path(&self) -> PathBuf {
        locked(&self.board).place.join("events")
    }

    fn commit(&self) -> Result<Value> {
        locked(&self.board).commit()
    }

    fn rewind(&self, place: &Value) -> Result<Option<String>> {
        locked(&self.board).rewind(place)
    }
}

logger_as_handler!(TensorBoard, "TensorBoard logger");

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use anyhow::{Context, Result, ensure};
    use tch::{Device, Kind, Tensor};

    use super::super::protobuf::reader::{Field, fields, inner};
    use super::*;

    /// Reads the records of an event file, or of all files of a folder, and checks their CRCs.
    fn records(path: &Path) -> Result<Vec<Vec<u8>>> {
        let mut records = vec![];
        let files = match path.is_dir() {
            true => event_files(path)?.iter().map(|name| path.join(name)).collect(),
            false => vec![path.to_owned()],
        };
        for file in files {
            let bytes = std::fs::read(file)?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let (length, after) = rest.split_first_chunk::<8>().context("a length")?;
                let (sum, after) = after.split_first_chunk::<4>().context("its sum")?;
                ensure!(u32::from_le_bytes(*sum) == masked_crc(length));
                let (data, after) = after.split_at(u64::from_le_bytes(*length) as usize);
                let (sum, after) = after.split_first_chunk::<4>().context("the sum")?;
                ensure!(u32::from_le_bytes(*sum) == masked_crc(data));
                records.push(data.to_vec());
                rest = after;
            }
        }
        Ok(records)
    }

    #[test]
    fn the_sum_is_tensorflows() {
        // The values are from RFC 3720, B.4, with TensorFlow's mask.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(
            masked_crc(&[0; 32]),
            (0x8a91_36aau32.rotate_right(15)).wrapping_add(0xa282_ead8)
        );
    }

    /// The steps of all events, except those that a mark of a restart takes back.
    fn steps(folder: &Path) -> Result<Vec<u64>> {
        let mut files = event_files(folder)?;
        files.sort();
        let mut steps = vec![];
        for file in files {
            for record in records(&folder.join(file))? {
                let event = fields(&record);
                let step = event.iter().find_map(|(number, value)| match value {
                    Field::Uint(step) if *number == field::EVENT_STEP => Some(*step),
                    _ => None,
                });
                let has = |number| event.iter().any(|(field, _)| *field == number);
                if has(field::EVENT_SESSION_LOG) {
                    steps.retain(|earlier| *earlier < step.unwrap_or(0));
                } else if has(field::EVENT_SUMMARY) {
                    steps.push(step.unwrap_or(0));
                }
            }
        }
        Ok(steps)
    }

    #[test]
    fn what_came_after_a_checkpoint_is_taken_back_in_whatever_file_it_is() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let log = |board: &TensorBoard, mut steps: std::ops::RangeInclusive<u64>| {
            steps.try_for_each(|step| board.scalar("loss", 0., step))
        };
        // This process was killed before its first checkpoint.
        log(&TensorBoard::create(folder.path())?, 1..=3)?;
        let first = TensorBoard::create(folder.path())?;
        first.text("note", "before the run", 0)?;
        first.begin(true)?;
        log(&first, 1..=5)?;
        let at_five = first.commit()?;
        log(&first, 6..=9)?;
        drop(first);
        assert_eq!(steps(folder.path())?, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);

        // This process was killed before its next checkpoint.
        let second = TensorBoard::create(folder.path())?;
        second.text("note", "before the run", 0)?;
        ensure!(second.rewind(&at_five)?.is_none());
        log(&second, 6..=20)?;
        drop(second);

        let third = TensorBoard::create(folder.path())?;
        ensure!(third.rewind(&at_five)?.is_none());
        log(&third, 6..=7)?;
        let at_seven = third.commit()?;
        log(&third, 8..=8)?;
        // The same process goes back and forth.
        ensure!(third.rewind(&at_seven)?.is_none());
        log(&third, 8..=9)?;
        third.flush()?;
        assert_eq!(steps(folder.path())?, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        ensure!(third.rewind(&at_five)?.is_none());
        third.flush()?;
        assert_eq!(steps(folder.path())?, [0, 1, 2, 3, 4, 5]);
        // The checkpoint is later than all events.
        ensure!(third.rewind(&at_seven)?.is_some());

        let elsewhere = tempfile::tempdir()?;
        let other = TensorBoard::create(elsewhere.path())?;
        let why = other.rewind(&at_seven)?.context("a reason")?;
        assert!(why.contains("has not the event files"), "{why}");
        for odd in [json!(1), json!({"run": "1", "files": {"../x": 1}, "last step": 1})] {
            ensure!(other.rewind(&odd)?.is_some());
        }
        Ok(())
    }

    /// The steps of the marks of a restart.
    fn restarts(folder: &Path) -> Result<Vec<u64>> {
        let mut steps = vec![];
        for record in records(folder)? {
            let event = fields(&record);
            if event.iter().any(|(number, _)| *number == field::EVENT_SESSION_LOG) {
                steps.extend(event.iter().filter_map(|(number, value)| match value {
                    Field::Uint(step) if *number == field::EVENT_STEP => Some(*step),
                    _ => None,
                }));
            }
        }
        Ok(steps)
    }

    #[test]
    fn a_restart_bears_the_step_after_the_largest_of_all_tags() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let board = TensorBoard::create(folder.path())?;
        let nothing_yet = board.commit()?;
        assert_eq!(nothing_yet["last step"], Value::Null);
        // Iterations and epochs stand in one file, so a later event may have a smaller step.
        board.scalar("loss", 0.5, 5)?;
        board.scalar("val/loss", 0.5, 1)?;
        let at_five = board.commit()?;
        assert_eq!(at_five["last step"], 5);
        board.scalar("loss", 0.5, 9)?;
        assert_eq!(board.commit()?["last step"], 9);
        ensure!(board.rewind(&at_five)?.is_none());
        assert_eq!(restarts(folder.path())?, [6]);
        // Steps that were taken back no longer count.
        board.scalar("val/loss", 0.5, 2)?;
        let again = board.commit()?;
        assert_eq!(again["last step"], 5);
        board.scalar("loss", 0.5, u64::MAX)?;
        let largest = board.commit()?;
        ensure!(board.rewind(&largest)?.is_none());
        assert_eq!(restarts(folder.path())?, [6, u64::MAX]);
        ensure!(board.rewind(&again)?.is_none());
        ensure!(board.rewind(&nothing_yet)?.is_none());
        assert_eq!(restarts(folder.path())?, [0]);
        Ok(())
    }

    fn everything(folder: &Path) -> Result<()> {
        let board = TensorBoard::create(folder)?;
        for step in 1..=200 {
            board.scalar("training/loss", 1. / step as f64, step)?;
        }
        let ramp = Tensor::arange_start_step(0., 64., 0.1, (Kind::Double, Device::Cpu));
        board.histogram("weights/fc", &Histogram::of(&ramp)?, 3)?;
        board.text("note", "ä **b**", 7)?;
        let picture = Tensor::ones([3, 5, 7], (Kind::Float, Device::Cpu));
        board.image("picture", &Image::from_tensor(&picture)?, 9)?;
        let parameters =
            [("lr", 0.1.into()), ("optimizer", "sgd".into()), ("nesterov", true.into())];
        board.hparams(parameters, ["training/loss"])?;
        Ok(())
    }

    #[test]
    fn what_is_written_can_be_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        everything(folder.path())?;
        let records = records(folder.path())?;
        assert_eq!(records.len(), 1 + 200 + 1 + 1 + 1 + 2);
        assert!(fields(&records[0]).contains(&(3, Field::Bytes(b"brain.Event:2"))));
        let event = fields(&records[2]);
        assert!(event.contains(&(2, Field::Uint(2))));
        let value = inner(&inner(&event, 5), 1);
        assert_eq!(value, [(1, Field::Bytes(b"training/loss")), (2, Field::Float(0.5))]);
        let histogram = inner(&inner(&inner(&fields(&records[201]), 5), 1), 5);
        assert_eq!(histogram[2], (3, Field::Double(640.)));
        let image = inner(&inner(&inner(&fields(&records[203]), 5), 1), 4);
        assert_eq!(image[..3], [(1, Field::Uint(5)), (2, Field::Uint(7)), (3, Field::Uint(3))]);
        Ok(())
    }

    const READER: &str = r#"
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
scalars = events.Scalars("training/loss")
assert [s.step for s in scalars] == list(range(1, 201)), scalars[:3]
assert all(abs(s.value - 1 / s.step) < 1e-7 for s in scalars)
h = events.Histograms("weights/fc")[0]
assert h.step == 3 and h.histogram_value.num == 640, h
assert sum(h.histogram_value.bucket) == 640 and len(h.histogram_value.bucket_limit) == 64
note = events.Tensors("note/text_summary")[0]
assert note.step == 7 and tensor_util.make_ndarray(note.tensor_proto)[0].decode() == "ä **b**"
image = events.Images("picture")[0]
assert (image.step, image.width, image.height) == (9, 7, 5), image
assert image.encoded_image_string.startswith(b"\x89PNG")
content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
assert start["lr"].number_value == 0.1 and start["optimizer"].string_value == "sgd"
assert start["nesterov"].bool_value is True
content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
assert [i.name for i in experiment.hparam_infos] == ["lr", "optimizer", "nesterov"]
assert [i.type for i in experiment.hparam_infos] == [3, 1, 2]
assert experiment.metric_infos[0].name.tag == "training/loss"
print("read")
"#;

    /// Runs `TENSORBOARD_PYTHON`, or `python3`, if that has TensorBoard.
    #[test]
    fn tensorboards_own_reader_agrees() -> Result<()> {
        let folder = tempfile::tempdir()?;
        everything(folder.path())?;
        let python = std::env::var("TENSORBOARD_PYTHON").unwrap_or_else(|_| "python3".into());
        let has = Command::new(&python).args(["-c", "import tensorboard"]).output();
        if !has.is_ok_and(|output| output.status.success()) {
            // Written this way, the text is not captured by the test runner.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: {python} has no tensorboard (pip install tensorboard)"
            );
            return Ok(());
        }
        let output = Command::new(python).args(["-c", READER]).arg(folder.path()).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{text}");
        assert_eq!(output.stdout, b"read\n");
        Ok(())
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_that_names_it() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("file");
        std::fs::write(&file, "")?;
        let error = TensorBoard::create(file.join("run")).err().context("it is a file")?;
        assert!(error.to_string().contains("file/run"), "{error}");
        Ok(())
    }
}
