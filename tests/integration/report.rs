//! Tests that look at the report of a run in a real browser: headless Chromium, found on the `PATH` or named by
//! `CHROMIUM`. `REPORT_SCREENSHOTS=FOLDER` keeps the pictures.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tch::Tensor;
use tch_ignite::engine::{Engine, Until};
use tch_ignite::loggers::{Logger, RunFolder};

use crate::common;

const NAMES: [&str; 5] =
    ["chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome"];

fn chromium() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CHROMIUM") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    let files = NAMES.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    files.into_iter().find(|file| file.is_file())
}

/// The browser; without one, this prints that the test is skipped.
fn browser() -> Option<PathBuf> {
    let browser = chromium();
    if browser.is_none() {
        common::skipped("no Chromium found to look at reports with (apt-get install chromium)");
    }
    browser
}

struct Look {
    /// The page's HTML after its scripts have run.
    dom: String,
    /// The lines of the browser's console.
    console: Vec<String>,
    /// The screenshot, as (3, H, W).
    pixels: Tensor,
}

fn look(browser: &Path, page: &Path, name: &str, width: u32, dark: bool) -> Result<Look> {
    let folder = tempfile::tempdir()?;
    let picture = folder.path().join("report.png");
    let run = |what: &str| {
        let mut command = Command::new(browser);
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]);
        command.args(["--disable-dev-shm-usage", "--enable-logging=stderr"]);
        command.arg(format!("--user-data-dir={}", folder.path().join("profile").display()));
        command.arg(format!("--window-size={width},1600"));
        if dark {
            command.arg("--blink-settings=preferredColorScheme=0");
        }
        let output = command.arg(what).arg(page).output()?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{}: {log}", output.status);
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), log))
    };
    let (dom, log) = run("--dump-dom")?;
    run(&format!("--screenshot={}", picture.display()))?;
    if let Some(kept) = std::env::var_os("REPORT_SCREENSHOTS") {
        std::fs::create_dir_all(&kept)?;
        std::fs::copy(&picture, Path::new(&kept).join(format!("{name}.png")))?;
    }
    let console = log.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect();
    let pixels = tch::vision::image::load(&picture)?;
    Ok(Look { dom, console, pixels })
}

impl Look {
    /// The number of pixels of about this colour.
    fn count(&self, colour: [i64; 3]) -> i64 {
        let colour = Tensor::from_slice(&colour).view([3, 1, 1]);
        let apart = (self.pixels.to_kind(tch::Kind::Int64) - colour).abs().amax([0i64], false);
        i64::try_from(apart.le(24).sum(tch::Kind::Int64)).unwrap_or(0)
    }

    #[track_caller]
    fn check(&self, charts: usize, curves: usize) {
        assert!(self.console.is_empty(), "{:?}", self.console);
        assert_eq!(self.dom.matches("<svg").count(), charts, "charts");
        assert_eq!(self.dom.matches("<polyline").count(), curves, "curves");
        assert!(!self.dom.contains("NaN,") && !self.dom.contains("inf,"));
    }
}

const BLUE: [i64; 3] = [0x00, 0x72, 0xb2];
const LIGHT_BLUE: [i64; 3] = [0x4a, 0xa8, 0xe0];
const RED: [i64; 3] = [0xc8, 0x1e, 0x1e];

/// A run folder to which `log` writes curves, with its report.
fn report(name: &str, log: impl Fn(&RunFolder) -> Result<()>) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let run = RunFolder::create(folder.path().join(name))?;
    log(&run)?;
    let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
    trainer.attach(run.clone());
    trainer.run(&mut (), vec![(); 30], Until::epochs(5))?;
    Ok(folder)
}

/// A pseudo-random number from -0.5 to 0.5.
fn noise(i: u64) -> f64 {
    ((i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / (1u64 << 24) as f64) - 0.5
}

fn training(run: &RunFolder) -> Result<()> {
    for i in 1..=3000u64 {
        let x = i as f64 / 3000.;
        run.scalar("training/loss", 2.3 * (-4. * x).exp() + 0.1 + 0.1 * noise(i), i)?;
        run.scalar("lr/base", 0.05 * (1. + (std::f64::consts::PI * x).cos()), i)?;
        run.scalar("lr/head", 0.1 * 10f64.powf(-4. * x), i)?;
    }
    run.config(&json!({"batch_size": 64, "optimizer": {"name": "sgd", "nesterov": false}}))?;
    Ok(())
}

#[test]
fn a_report_shows_its_curves() -> Result<()> {
    let Some(browser) = browser() else { return Ok(()) };
    let folder = report("digits", |run| {
        training(run)?;
        for epoch in 1..=10u64 {
            let x = epoch as f64 / 10.;
            run.scalar("val/loss", 2. * (-3. * x).exp() + 0.15, epoch * 300)?;
            run.scalar("val/accuracy", 1. - 0.9 * (-4. * x).exp(), epoch * 300)?;
            run.scalar("ema/accuracy", 1. - 0.95 * (-4.5 * x).exp(), epoch * 300)?;
        }
        Ok(())
    })?;
    let page = folder.path().join("digits/report.html");
    let wide = look(&browser, &page, "wide", 1280, false)?;
    wide.check(3, 6);
    assert!(wide.count(BLUE) > 500, "{}", wide.count(BLUE));
    let dark = look(&browser, &page, "dark", 1280, true)?;
    dark.check(3, 6);
    assert!(dark.count(LIGHT_BLUE) > 500, "{}", dark.count(LIGHT_BLUE));
    assert!(dark.pixels.mean(tch::Kind::Float).double_value(&[]) < 80., "the page is dark");
    let narrow = look(&browser, &page, "narrow", 420, false)?;
    narrow.check(3, 6);
    assert!(narrow.count(BLUE) > 200, "{}", narrow.count(BLUE));
    Ok(())
}

#[test]
fn without_validation_it_is_whole_too() -> Result<()> {
    let Some(browser) = browser() else { return Ok(()) };
    let folder = report("training only", training)?;
    let page = folder.path().join("training only/report.html");
    let look = look(&browser, &page, "no_validation", 1280, false)?;
    look.check(2, 3);
    assert!(look.count(BLUE) > 200);
    Ok(())
}

#[test]
fn what_is_no_number_is_marked() -> Result<()> {
    let Some(browser) = browser() else { return Ok(()) };
    let folder = report("diverged", |run| {
        for i in 1..=200u64 {
            let value = match i {
                80 => f64::INFINITY,
                120.. => f64::NAN,
                _ => 1. + (i as f64 / 20.).exp(),
            };
            run.scalar("training/loss", value, i)?;
            run.scalar("training/grad_norm", f64::NAN, i)?;
            run.scalar("val/accuracy", 0.5, i)?;
        }
        Ok(())
    })?;
    let page = folder.path().join("diverged/report.html");
    let look = look(&browser, &page, "nan", 1280, false)?;
    look.check(2, 3);
    assert!(look.count(RED) > 100 && look.dom.contains("no finite numbers"));
    assert!(look.dom.contains("at step 80, 82 values not finite"));
    Ok(())
}

#[test]
fn fifty_curves_can_be_told_apart() -> Result<()> {
    let Some(browser) = browser() else { return Ok(()) };
    let folder = report("fifty", |run| {
        for class in 0..50u64 {
            for epoch in 1..=20u64 {
                let value = 1. - (-(epoch as f64) / (4. + class as f64 / 5.)).exp();
                run.scalar(&format!("val/recall/{class}"), value, epoch)?;
                run.scalar(&format!("val/weight of class {class}"), value * noise(class), epoch)?;
            }
        }
        Ok(())
    })?;
    let page = folder.path().join("fifty/report.html");
    let look = look(&browser, &page, "fifty", 1280, false)?;
    look.check(51, 100);
    assert!(look.dom.contains("50 curves"));
    Ok(())
}

#[test]
fn a_report_of_nothing_is_a_page() -> Result<()> {
    let Some(browser) = browser() else { return Ok(()) };
    let folder = report("nothing", |_| Ok(()))?;
    let look = look(&browser, &folder.path().join("nothing/report.html"), "nothing", 800, false)?;
    look.check(0, 0);
    assert!(look.dom.contains("Nothing was logged yet"));
    Ok(())
}

#[test]
fn the_look_sees_errors() -> Result<()> {
    let Some(browser) = browser() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let page = folder.path().join("wrong.html");
    std::fs::write(&page, "<script>nothing.here()</script>")?;
    let look = look(&browser, &page, "wrong", 400, false)?;
    let seen = look.console.first().context("an error")?;
    ensure!(seen.contains("nothing is not defined"), "{seen}");
    Ok(())
}
