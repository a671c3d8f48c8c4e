//! Tests of pictures in folders: torchvision's classes and order, and what is said of folders that are not as expected.

use std::fs;
use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_ignite::data::{DataLoader, Dataset, ImageFolder, IntoSource, SplitMix64};

/// Writes a picture of 2 x 3 pixels, all with these values of red, green and blue.
fn write(path: impl AsRef<Path>, rgb: [u8; 3]) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    let picture = Tensor::from_slice(&rgb).view([3, 1, 1]).expand([3, 2, 3], false).contiguous();
    tch::vision::image::save(&picture, path).unwrap();
}

fn text<T>(result: Result<T, impl Into<anyhow::Error>>) -> String {
    format!("{:#}", result.err().expect("an error").into())
}

/// The expected order is the one of torchvision's `ImageFolder` for these files.
#[test]
fn classes_and_samples_are_torchvisions() -> Result<()> {
    let root = tempfile::tempdir()?;
    let files = [
        "b/2.png",
        "b/10.PNG",
        "b/x/1.png",
        "b/x-y/0.png",
        "b/x/k/3.png",
        "b/notes.txt",
        "a/.png",
        "a/z.bmp",
        "Z/q.png",
        "top.png",
    ];
    for (number, file) in files.into_iter().enumerate() {
        let path = root.path().join(file);
        write(path.with_extension("png"), [number as u8, 7, 9]);
        if path.extension().is_none_or(|extension| extension != "png") {
            fs::rename(path.with_extension("png"), path)?;
        }
    }
    let folder = ImageFolder::new(root.path())?;
    assert_eq!(folder.classes(), ["Z", "a", "b"]);
    let found: Vec<_> = folder
        .samples()
        .iter()
        .map(|(path, class)| (path.strip_prefix(root.path()).unwrap().to_str().unwrap(), *class))
        .collect();
    // The folders of a class are sorted as text, where '-' comes before '/'.
    let expected = [
        ("Z/q.png", 0),
        ("a/.png", 1),
        ("a/z.bmp", 1),
        ("b/10.PNG", 2),
        ("b/2.png", 2),
        ("b/x/1.png", 2),
        ("b/x-y/0.png", 2),
        ("b/x/k/3.png", 2),
    ];
    assert_eq!(found, expected);
    assert_eq!(folder.targets(), [0, 1, 1, 2, 2, 2, 2, 2]);
    let (picture, class) = folder.get(4, &mut SplitMix64::new(0))?;
    assert_eq!((picture.size(), picture.kind(), class), (vec![3, 2, 3], Kind::Uint8, 2));
    assert_eq!(
        Vec::<i64>::try_from(picture.select(1, 0).select(1, 1).to_kind(Kind::Int64))?,
        [0, 7, 9]
    );

    // Bytes are normalised in the batch, by workers too.
    let loader = DataLoader::new(folder, 4)?.normalize(&[0.5, 0., 0.1], &[0.5, 1., 2.])?;
    let (mean, std) =
        (Tensor::from_slice(&[0.5f32, 0., 0.1]), Tensor::from_slice(&[0.5f32, 1., 2.]));
    for workers in [0, 2] {
        let mut source = loader.clone().num_workers(workers).into_source();
        source.seek(0, 1)?;
        let (x, _) = source.next().unwrap()?;
        let bytes = Tensor::from_slice(&[0f32, 7., 9.]);
        let expected: Tensor = (bytes / 255 - &mean) / &std;
        assert_eq!(x.size(), [4, 3, 2, 3]);
        assert_eq!(x.get(0).select(1, 1).select(1, 2), expected);
    }
    Ok(())
}

#[test]
fn folders_that_are_not_as_expected_are_refused() -> Result<()> {
    let root = tempfile::tempdir()?;
    let root = root.path();
    assert!(text(ImageFolder::new(root.join("gone"))).contains("cannot read the folder"));
    let none = text(ImageFolder::new(root));
    assert!(
        none.contains("needs a folder for each class") && none.contains(root.to_str().unwrap())
    );
    write(root.join("cat/1.png"), [1, 2, 3]);
    fs::create_dir(root.join("dog"))?;
    fs::create_dir(root.join("emu"))?;
    fs::write(root.join("emu/readme.txt"), "")?;
    let empty = text(ImageFolder::new(root));
    assert!(empty.contains("no picture for the classes dog, emu"), "{empty}");
    assert!(empty.contains(".pgm;") && !empty.contains(".webp"), "{empty}");
    let others = text(ImageFolder::with_loader(root, |_| Ok(Tensor::from(0.))));
    assert!(others.contains(".pgm, .tif, .tiff, .webp;"), "{others}");
    for name in ["dog", "emu"] {
        fs::remove_dir_all(root.join(name))?;
    }
    fs::write(root.join("cat/2.webp"), "")?;
    let other = text(ImageFolder::new(root));
    assert!(other.contains("2.webp") && other.contains("with_loader"), "{other}");
    let folder = ImageFolder::with_loader(root, |path| {
        Ok(Tensor::from(path.to_str().map_or(0, str::len) as i64))
    })?;
    assert_eq!(folder.len(), 2);
    fs::remove_file(root.join("cat/2.webp"))?;

    // Pictures that go or are broken after the folder was listed are named.
    fs::write(root.join("cat/3.jpg"), "not a picture")?;
    let folder = ImageFolder::new(root)?;
    fs::remove_file(root.join("cat/1.png"))?;
    let error = text(folder.get(0, &mut SplitMix64::new(0)));
    assert!(error.contains("1.png' cannot be read: ") && error.contains("No such file"), "{error}");
    let error = text(folder.get(1, &mut SplitMix64::new(0)));
    assert!(error.contains("3.jpg' cannot be read"), "{error}");
    let error = text(DataLoader::new(folder, 1)?.into_source().next().unwrap());
    assert!(error.starts_with("sample 0 of the dataset: the picture"), "{error}");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(root.join("cat"), root.join("cat/again"))?;
        let error = text(ImageFolder::new(root));
        assert!(error.contains("again' is a link to a folder that it is in"), "{error}");
    }
    Ok(())
}

#[test]
fn batches_that_cannot_be_normalised_say_why() -> Result<()> {
    let loader = |kind, channels: i64| {
        let pictures = tch_ignite::data::from_fn(2, move |_, _| {
            Ok((Tensor::f_zeros([channels, 2, 2], (kind, Device::Cpu))?, 0i64))
        });
        DataLoader::new(pictures, 2)?.normalize(&[0.1, 0.2], &[1., 1.])
    };
    let error =
        |kind, channels| text(loader(kind, channels).unwrap().into_source().next().unwrap());
    assert!(error(Kind::Float, 2).contains("inputs of kind Uint8, but they are Float"));
    assert!(error(Kind::Uint8, 3).contains("the shape is [2, 3, 2, 2]"));
    assert!(loader(Kind::Uint8, 2)?.normalize(&[], &[]).is_err());
    assert!(loader(Kind::Uint8, 2)?.normalize(&[0.], &[0.]).is_err());
    Ok(())
}
