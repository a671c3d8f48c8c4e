//! Tests of the changes of pictures: torchvision's numbers, and random draws that belong to the sample.

use anyhow::Result;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tch_ignite::data::transforms::{
    ColorJitter, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, center_crop,
    crop, cutmix, each, horizontal_flip, mixup, pad, random_crop, random_horizontal_flip,
    random_resized_crop, resize, resize_shorter_edge,
};
use tch_ignite::data::{DataLoader, Dataset, IntoSource, SplitMix64, from_fn};

const SHAPE: [i64; 3] = [3, 6, 8];

/// The picture of the golden cases.
fn picture(kind: Kind) -> Tensor {
    let index = Tensor::arange(SHAPE.iter().product::<i64>(), (Kind::Int64, Device::Cpu));
    let values = (&index * &index * 7 + &index * 13 + 5).remainder(256).view(SHAPE);
    match kind {
        Kind::Uint8 => values.to_kind(kind),
        _ => values.to_kind(kind) / 255,
    }
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn the_numbers_are_torchvisions() -> Result<()> {
    let cases: Vec<Value> = serde_json::from_str(include_str!("../golden/transforms.json"))?;
    assert!(cases.len() > 60);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let kind = if case["kind"] == "uint8" { Kind::Uint8 } else { Kind::Float };
        let arguments = numbers(&case["arguments"]);
        let whole: Vec<_> = arguments.iter().map(|number| *number as i64).collect();
        let x = picture(kind);
        let change = |x: &Tensor| match (name, &*whole) {
            ("resize", &[height, width]) => resize(x, [height, width]),
            ("resize_shorter_edge", &[length]) => resize_shorter_edge(x, length),
            ("center_crop", &[height, width]) => center_crop(x, [height, width]),
            ("pad", &[left, top, right, bottom]) => pad(x, [left, top, right, bottom]),
            ("crop", []) => crop(x, 2, 3, [4, 5]),
            ("crop", &[top, left, height, width]) => crop(x, top, left, [height, width]),
            ("horizontal_flip", []) => horizontal_flip(x),
            ("adjust_brightness", _) => adjust_brightness(x, arguments[0]),
            ("adjust_contrast", _) => adjust_contrast(x, arguments[0]),
            ("adjust_saturation", _) => adjust_saturation(x, arguments[0]),
            ("adjust_hue", _) => adjust_hue(x, arguments[0]),
            _ => panic!("no such case: {name}"),
        };
        let found = change(&x)?;
        assert_eq!(found.kind(), kind);
        let shape: Vec<_> = numbers(&case["shape"]).into_iter().map(|n| n as i64).collect();
        assert_eq!(found.size(), shape, "{name} {arguments:?}");
        let (flat, expected) = (found.reshape(-1).to_kind(Kind::Double), numbers(&case["values"]));
        let furthest = Vec::<f64>::try_from(flat)?
            .into_iter()
            .zip(expected)
            .map(|(found, expected)| (found - expected).abs())
            .fold(0., f64::max);
        // The values of the file have nine digits.
        let most = if kind == Kind::Uint8 { 0. } else { 1e-6 };
        assert!(furthest <= most, "{name} {arguments:?} of {kind:?} is off by {furthest}");
        // Pictures that lie in memory as a decoder leaves them, and batches, give the same.
        let pixels_first = x.permute([1, 2, 0]).contiguous().permute([2, 0, 1]);
        assert_eq!(change(&pixels_first)?, found, "{name} {arguments:?}");
        let batch = Tensor::stack(&[&x, &x.flip([1])], 0);
        assert_eq!(change(&batch)?.get(0), found, "{name} {arguments:?}");
    }
    Ok(())
}

#[test]
fn random_crops_are_parts_of_the_padded_picture() -> Result<()> {
    let x = picture(Kind::Uint8);
    let padded = pad(&x, [2; 4])?;
    let parts: Vec<_> = (0..=4)
        .flat_map(|top| (0..=4).map(move |left| (top, left)))
        .map(|(top, left)| crop(&padded, top, left, [6, 8]).unwrap())
        .collect();
    let mut seen = [0; 25];
    let mut rng = SplitMix64::new(1);
    for _ in 0..1000 {
        let part = random_crop(&x, [6, 8], 2, &mut rng)?;
        seen[parts.iter().position(|other| *other == part).expect("a part")] += 1;
    }
    // 40 are expected, with a standard deviation of 6.
    assert!(seen.iter().all(|count| (15..65).contains(count)), "{seen:?}");
    let flips = (0..1000).filter(|_| random_horizontal_flip(&x, 0.3, &mut rng).unwrap() != x);
    assert!((240..360).contains(&flips.count()));
    Ok(())
}

#[test]
fn wrong_arguments_are_refused_with_what_was_given() {
    let (x, mut rng) = (picture(Kind::Uint8), SplitMix64::new(0));
    let rng = &mut rng;
    let ints = x.to_kind(Kind::Int64);
    let flat = Tensor::from_slice(&[1f32, 2.]);
    let labels = Tensor::from_slice(&[0i64, 1]);
    let two = Tensor::zeros([2, 3, 4, 4], (Kind::Float, Device::Cpu));
    let full = 0.5..=1.;
    for (refused, expected) in [
        (
            crop(&x, 3, 0, [4, 4]),
            "the crop of [4, 4] at [3, 0] is not within the picture of [6, 8]",
        ),
        (crop(&x, i64::MAX, 0, [4, 4]), "is not within"),
        (crop(&x, 0, -1, [4, 4]), "is not within"),
        (crop(&x, 0, 0, [0, 4]), "at least 1"),
        (pad(&x, [0, -1, 0, 0]), "cannot be negative"),
        (random_crop(&x, [8, 8], 0, rng), "pictures of at least [8, 8], but with the padding of 0"),
        (resize(&x, [0, 3]), "[0, 3] was given"),
        (resize(&flat, [1, 1]), "[channels, height, width]"),
        (random_resized_crop(&x, [2, 2], 0.0..=1., full.clone(), rng), "scale needs a range"),
        (random_resized_crop(&x, [2, 2], full.clone(), 2.0..=1., rng), "ratio needs a range"),
        (random_horizontal_flip(&x, 1.5, rng), "1.5 was given"),
        (adjust_brightness(&x, -1.), "-1 was given"),
        (adjust_contrast(&ints, 1.), "its kind is Int64"),
        (adjust_hue(&x, 0.6), "0.6 was given"),
        (adjust_saturation(&Tensor::zeros([2, 4, 4], (Kind::Float, Device::Cpu)), 1.), "it has 2"),
        (ColorJitter::new().hue(0.7).apply(&x, rng), "hue must be at least 0 and at most 0.5"),
        (
            ColorJitter::new().brightness(-1.).apply(&x, rng),
            "brightness must be at least 0 and finite, but -1 was given",
        ),
        (ColorJitter::new().contrast(f64::NAN).apply(&x, rng), "contrast"),
        (mixup(&two.to_kind(Kind::Uint8), &labels, 2, 1., rng).map(|(x, _)| x), "floats"),
        (mixup(&two, &labels, 2, 0., rng).map(|(x, _)| x), "alpha"),
        (mixup(&two, &labels.get(0), 2, 1., rng).map(|(x, _)| x), "targets of shape"),
        (mixup(&two, &labels.to_kind(Kind::Int), 2, 1., rng).map(|(x, _)| x), "Int64"),
        (cutmix(&two, &two.select(1, 0).select(1, 0), 3, 1., rng).map(|(x, _)| x), "3 classes"),
        (each(&Tensor::from(1.), |x| Ok(x.shallow_clone())), "needs a batch"),
    ] {
        let error = format!("{:#}", refused.expect_err(expected));
        assert!(error.contains(expected), "{error}");
    }
}

/// The shares that the targets tell are those of the inputs, and a sample's partner is the one before it.
#[test]
fn mixed_inputs_have_the_shares_of_their_targets() -> Result<()> {
    let x = Tensor::rand([4, 3, 6, 8], (Kind::Float, Device::Cpu));
    let y = Tensor::from_slice(&[2i64, 0, 1, 1]);
    let mut rng = SplitMix64::new(9);
    for _ in 0..20 {
        let (mixed, shares) = mixup(&x, &y, 4, 0.4, &mut rng)?;
        // The first sample is of class 2, and the last one, its partner, of class 1.
        let own = shares.double_value(&[0, 2]);
        assert!((shares.double_value(&[0, 1]) - (1. - own)).abs() < 1e-6);
        let expected = &x * own + x.roll([1], [0]) * (1. - own);
        assert!((mixed - expected).abs().max().double_value(&[]) < 1e-6);
        let (pasted, shares) = cutmix(&x, &y, 4, 1., &mut rng)?;
        let own = shares.double_value(&[0, 2]);
        let kept = pasted.eq_tensor(&x).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((kept - own).abs() < 1e-6, "{kept} {own}");
        let partner = pasted.eq_tensor(&x.roll([1], [0])).logical_or(&pasted.eq_tensor(&x));
        assert!(bool::try_from(partner.all())?);
    }
    // Shares stay shares.
    let (_, twice) = mixup(&x, &mixup(&x, &y, 4, 0.4, &mut rng)?.1, 4, 0.4, &mut rng)?;
    let sums = twice.sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    assert!((sums - 1.).abs().max().double_value(&[]) < 1e-6);
    Ok(())
}

#[test]
fn augmentation_does_not_depend_on_workers_or_on_where_a_pass_begins() -> Result<()> {
    let loader = |workers| {
        let jitter = ColorJitter::new().brightness(0.4).contrast(0.4).saturation(0.4).hue(0.1);
        let pictures = from_fn(11, |index, _| Ok((picture(Kind::Uint8), index as i64)));
        let augmented = pictures.map(move |(x, class), rng| {
            let x = random_resized_crop(&x, [5, 5], 0.2..=1., 0.7..=1.4, rng)?;
            let x = random_horizontal_flip(&x, 0.5, rng)?;
            Ok((jitter.apply(&x, rng)?, class))
        });
        DataLoader::new(augmented, 3)?.shuffle(5).normalize(&[0.4, 0.5, 0.6], &[0.2, 0.3, 0.4]).map(
            |loader| {
                loader.map_batches(|(x, y), rng| mixup(&x, &y, 11, 0.4, rng)).num_workers(workers)
            },
        )
    };
    let from = |workers, batch| -> Result<Vec<(Tensor, Tensor)>> {
        let mut source = loader(workers)?.into_source();
        source.seek(2, batch)?;
        std::iter::from_fn(|| source.next()).collect()
    };
    let all = from(0, 0)?;
    assert_eq!(all.len(), 4);
    for (workers, batch) in [(0, 2), (1, 0), (3, 1)] {
        assert_eq!(from(workers, batch)?, all[batch as usize..]);
    }
    Ok(())
}
