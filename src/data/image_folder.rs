use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result as AnyResult};
use tch::Tensor;

use super::dataset::out_of_range;
use super::{Dataset, SplitMix64};
use crate::error::{Error, Result};

/// Pictures in a folder for each class: torchvision's `ImageFolder`, with its classes and its order.
///
/// ```text
/// root/cat/1.png
/// root/cat/more/2.jpg
/// root/dog/3.png
/// ```
///
/// The folders directly below `root`, sorted by name, are the classes 0, 1, …; all pictures below a class's folder are
/// its samples. A sample is a picture of bytes (3, H, W) in RGB, and its class. Pictures are read when they are needed,
/// on the workers of a [`DataLoader`](super::DataLoader); [`transforms`](super::transforms) give them one size.
///
/// ```no_run
/// use tch_ignite::data::{DataLoader, Dataset, ImageFolder, transforms};
/// let folder = ImageFolder::new("pictures/train")?;
/// println!("{} pictures of {:?}", folder.len(), folder.classes());
/// let pictures = folder.map(|(picture, class), rng| {
///     let picture = transforms::random_resized_crop(&picture, [224, 224], 0.08..=1., 3. / 4. ..=4. / 3., rng)?;
///     Ok((transforms::random_horizontal_flip(&picture, 0.5, rng)?, class))
/// });
/// let train = DataLoader::new(pictures, 64)?
///     .shuffle(42)
///     .num_workers(4)
///     .normalize(&[0.485, 0.456, 0.406], &[0.229, 0.224, 0.225])?;
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Clone)]
pub struct ImageFolder {
    classes: Vec<String>,
    samples: Vec<(PathBuf, i64)>,
    load: Arc<LoadFn>,
}

type LoadFn = dyn Fn(&Path) -> AnyResult<Tensor> + Send + Sync;

/// The endings of files that torchvision takes for pictures, and whether our own decoder reads them.
const EXTENSIONS: [(&str, bool); 9] = [
    ("jpg", true),
    ("jpeg", true),
    ("png", true),
    ("ppm", true),
    ("bmp", true),
    ("pgm", true),
    ("tif", false),
    ("tiff", false),
    ("webp", false),
];

impl ImageFolder {
    /// Finds the pictures below `root`: files that end in `.jpg`, `.jpeg`, `.png`, `.ppm`, `.bmp` or `.pgm`, in small or
    /// capital letters. libtorch's bindings decode them (stb_image).
    ///
    /// Costs a walk over all folders; no picture is read.
    ///
    /// # Errors
    /// A folder that cannot be read, no folder of a class, a class without pictures, or a picture of a type that needs
    /// [another decoder](Self::with_loader) (`.tif`, `.tiff`, `.webp`).
    pub fn new(root: impl AsRef<Path>) -> Result<Self> {
        let folder = Self::find(root.as_ref(), Arc::new(decode), true)?;
        let other = folder.samples.iter().find(|(path, _)| reads(path) == Some(false));
        if let Some((path, _)) = other {
            return Err(Error::invalid(format!(
                "'{}' is of a type that ImageFolder::new does not read; give ImageFolder::with_loader a decoder, or convert it to PNG",
                path.display()
            )));
        }
        Ok(folder)
    }

    /// Finds the pictures like [`new`](Self::new), and those that end in `.tif`, `.tiff` or `.webp`. `load` reads a
    /// picture, a tensor (C, H, W).
    ///
    /// # Errors
    /// A folder that cannot be read, no folder of a class, or a class without pictures.
    pub fn with_loader(
        root: impl AsRef<Path>,
        load: impl Fn(&Path) -> AnyResult<Tensor> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::find(root.as_ref(), Arc::new(load), false)
    }

    /// Finds the pictures. `ours` says that our own decoder reads them, for the errors.
    fn find(root: &Path, load: Arc<LoadFn>, ours: bool) -> Result<Self> {
        let folders = entries(root)?.into_iter().filter(|entry| entry.is_folder);
        let mut folders: Vec<_> = folders.map(|entry| entry.name).collect();
        folders.sort();
        if folders.is_empty() {
            return Err(Error::invalid(format!(
                "ImageFolder needs a folder for each class, but '{}' has no folder in it",
                root.display()
            )));
        }
        let (mut samples, mut empty) = (Vec::new(), Vec::new());
        for (class, name) in folders.iter().enumerate() {
            let before = samples.len();
            let mut files = Vec::new();
            walk(&root.join(name), &mut vec![], &mut files)?;
            files.sort();
            let paths = files.into_iter().map(|(folder, file)| Path::new(&folder).join(file));
            samples.extend(
                paths.filter(|path| reads(path).is_some()).map(|path| (path, class as i64)),
            );
            if samples.len() == before {
                empty.push(name.to_string_lossy());
            }
        }
        if !empty.is_empty() {
            let endings = EXTENSIONS.iter().filter(|(_, reads)| *reads || !ours);
            let endings: Vec<_> = endings.map(|(ending, _)| format!(".{ending}")).collect();
            return Err(Error::invalid(format!(
                "found no picture for the classes {} in '{}': pictures end in {}; remove the folders, or put pictures into them",
                empty.join(", "),
                root.display(),
                endings.join(", ")
            )));
        }
        let classes = folders.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        Ok(Self { classes, samples, load })
    }

    /// Returns the names of the classes, which are those of their folders. Class `i` is the `i`-th.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns path and class of each picture.
    pub fn samples(&self) -> &[(PathBuf, i64)] {
        &self.samples
    }

    /// Returns the class of each picture, as [`StratifiedKFold`](super::StratifiedKFold) takes it.
    pub fn targets(&self) -> Vec<i64> {
        self.samples.iter().map(|(_, class)| *class).collect()
    }
}

impl fmt::Debug for ImageFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageFolder")
            .field("classes", &self.classes)
            .field("samples", &self.samples.len())
            .finish_non_exhaustive()
    }
}

impl Dataset for ImageFolder {
    type Item = (Tensor, i64);

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn get(&self, index: usize, _rng: &mut SplitMix64) -> AnyResult<Self::Item> {
        let sample = self.samples.get(index).ok_or_else(|| out_of_range(index, self.len()))?;
        let (path, class) = sample;
        let picture = (self.load)(path)
            .with_context(|| format!("the picture '{}' cannot be read", path.display()))?;
        Ok((picture, *class))
    }
}

fn decode(path: &Path) -> AnyResult<Tensor> {
    let bytes = std::fs::read(path)?;
    Ok(tch::vision::image::load_from_memory(&bytes)?)
}

/// Returns whether our own decoder reads the file; `None` where it is no picture.
fn reads(path: &Path) -> Option<bool> {
    // A name such as ".png" has no extension for Rust, but has one for torchvision.
    let name = path.file_name()?.to_string_lossy().to_lowercase();
    let (_, extension) = name.rsplit_once('.')?;
    EXTENSIONS.iter().find(|(known, _)| *known == extension).map(|(_, reads)| *reads)
}

struct Entry {
    name: OsString,
    is_folder: bool,
}

/// Lists a folder. Links are followed.
fn entries(folder: &Path) -> Result<Vec<Entry>> {
    let list = || {
        let entry = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            let is_folder = std::fs::metadata(entry.path()).is_ok_and(|data| data.is_dir());
            Ok(Entry { name: entry.file_name(), is_folder })
        };
        std::fs::read_dir(folder)?.map(entry).collect::<std::io::Result<Vec<_>>>()
    };
    list().map_err(|error| {
        Error::invalid(format!(
            "ImageFolder cannot read the folder '{}': {error}",
            folder.display()
        ))
    })
}

/// Notes folder and name of each file below `folder`. `above` has the folders that it is in, without links.
fn walk(
    folder: &Path,
    above: &mut Vec<PathBuf>,
    files: &mut Vec<(OsString, OsString)>,
) -> Result<()> {
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    if above.contains(&real) {
        return Err(Error::invalid(format!(
            "'{}' is a link to a folder that it is in; remove it",
            folder.display()
        )));
    }
    above.push(real);
    for entry in entries(folder)? {
        match entry.is_folder {
            true => walk(&folder.join(entry.name), above, files)?,
            false => files.push((folder.as_os_str().to_owned(), entry.name)),
        }
    }
    above.pop();
    Ok(())
}
