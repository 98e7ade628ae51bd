//! A run's curves as pictures: loss, learning rate and evaluation.

use std::ops::Range;
use std::sync::Once;

use image::ImageEncoder;
use image::codecs::png::PngEncoder;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use super::metrics::{EvalReport, StepReport};

const SIZE: (u32, u32) = (960, 540);
/// The letters come with the program: a machine without fonts draws the same picture.
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(230, 230, 230);
const STEP: RGBColor = RGBColor(174, 199, 232);
const SMOOTH: RGBColor = RGBColor(31, 119, 180);
const EVAL: RGBColor = RGBColor(214, 90, 20);

/// One picture.
#[derive(Debug, Clone)]
pub struct Curve {
    /// The name of its file, without an ending.
    pub name: &'static str,
    title: String,
    axis: &'static str,
    series: Vec<Series>,
}

#[derive(Debug, Clone)]
struct Series {
    label: &'static str,
    look: Look,
    points: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Look {
    Thin,
    Line,
    Dots,
}

/// The curves of a run over `output`; that of the evaluation where there was one.
pub fn curves(output: &str, steps: &[StepReport], evals: &[EvalReport]) -> Vec<Curve> {
    let of_steps = |value: fn(&StepReport) -> f64| steps.iter().map(|s| (s.step as f64, value(s))).collect::<Vec<_>>();
    let of_evals = |value: fn(&EvalReport) -> f64| {
        let points = evals.iter().map(|e| (e.step as f64, value(e)));
        points.filter(|(_, value)| value.is_finite()).collect::<Vec<_>>()
    };
    let losses = of_steps(|s| s.loss);
    let mut series = vec![Series { label: "each step", look: Look::Thin, points: thinned(&losses) }];
    if losses.len() >= 10 {
        series.push(Series { label: "smoothed", look: Look::Line, points: smooth(&losses) });
    }
    let eval_losses = of_evals(|e| e.eval_loss);
    if !eval_losses.is_empty() {
        series.push(Series { label: "evaluation", look: Look::Dots, points: eval_losses.clone() });
    }
    let rates = vec![Series { label: "learning rate", look: Look::Line, points: thinned(&of_steps(|s| s.lr)) }];
    let mut curves = vec![
        Curve { name: "loss", title: format!("Training loss ({output})"), axis: "loss", series },
        Curve { name: "learning_rate", title: "Learning rate".into(), axis: "learning rate", series: rates },
    ];
    if !evals.is_empty() {
        let accuracies = of_evals(|e| e.eval_accuracy.unwrap_or(f64::NAN));
        let (axis, points) =
            if accuracies.is_empty() { ("evaluation loss", eval_losses) } else { ("accuracy", accuracies) };
        let series = vec![Series { label: axis, look: Look::Dots, points }];
        curves.push(Curve { name: "eval", title: format!("Evaluation ({output})"), axis, series });
    }
    curves
}

impl Curve {
    /// The text of an SVG file, or what the drawing library said.
    pub fn svg(&self) -> Result<String, String> {
        let mut text = String::new();
        self.draw(SVGBackend::with_string(&mut text, SIZE).into_drawing_area())?;
        Ok(text)
    }

    /// The bytes of a PNG file, or what the drawing library said.
    pub fn png(&self) -> Result<Vec<u8>, String> {
        let (width, height) = SIZE;
        let mut pixels = vec![0; 3 * width as usize * height as usize];
        self.draw(BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area())?;
        let mut file = Vec::new();
        PngEncoder::new(&mut file)
            .write_image(&pixels, width, height, image::ExtendedColorType::Rgb8)
            .map_err(|e| e.to_string())?;
        Ok(file)
    }

    fn draw<B: DrawingBackend>(&self, area: DrawingArea<B, Shift>) -> Result<(), String> {
        static REGISTERED: Once = Once::new();
        REGISTERED.call_once(|| {
            let font = epaint_default_fonts::UBUNTU_LIGHT;
            // A font that cannot be read is told of where the first text is drawn.
            let _ = register_font(FONT, FontStyle::Normal, font);
        });
        self.draw_on(&area).and_then(|()| area.present()).map_err(|e| e.to_string())
    }

    fn draw_on<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        area.fill(&WHITE)?;
        let points = || self.series.iter().flat_map(|s| &s.points);
        let last = points().map(|(step, _)| *step).fold(1.0, f64::max);
        let Range { start: low, end: high } = range(points().map(|(_, value)| *value));

        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, 22).into_font().color(&INK))
            .margin(18)
            .x_label_area_size(46)
            .y_label_area_size(100)
            .build_cartesian_2d(0.0..last * 1.02, low..high)?;
        let label = (FONT, 15).into_font().color(&INK);
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc(self.axis)
            .axis_desc_style((FONT, 16).into_font().color(&INK))
            .label_style(label.clone())
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(WHITE)
            .x_labels(10)
            .y_labels(8)
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_label_formatter(&|v| number(*v, high - low))
            .draw()?;
        for Series { label, look, points } in &self.series {
            let (color, width) = match look {
                Look::Thin => (STEP, 1),
                Look::Line => (SMOOTH, 2),
                Look::Dots => (EVAL, 2),
            };
            let line = LineSeries::new(points.iter().copied(), color.stroke_width(width));
            if *look == Look::Dots {
                chart.draw_series(line)?;
                chart
                    .draw_series(points.iter().map(|point| Circle::new(*point, 4, color.filled())))?
                    .label(*label)
                    .legend(move |(x, y)| Circle::new((x + 12, y), 4, color.filled()));
            } else {
                chart
                    .draw_series(line)?
                    .label(*label)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(2)));
            }
        }
        if self.series.len() > 1 {
            chart
                .configure_series_labels()
                .position(self.emptiest_corner(last, low..high))
                .margin(14)
                .legend_area_size(34)
                .background_style(WHITE.mix(0.85))
                .border_style(GRID)
                .label_font(label)
                .draw()?;
        }
        Ok(())
    }

    /// The corner for the legend: where the smallest shares of the series' points lie.
    fn emptiest_corner(&self, last: f64, Range { start: low, end: high }: Range<f64>) -> SeriesLabelPosition {
        let corners = [
            (SeriesLabelPosition::UpperRight, true, true),
            (SeriesLabelPosition::UpperLeft, false, true),
            (SeriesLabelPosition::LowerRight, true, false),
            (SeriesLabelPosition::LowerLeft, false, false),
        ];
        let beyond = |part: f64, far: bool| if far { part > 0.75 } else { part < 0.25 };
        let covered = |right: bool, upper: bool| -> f64 {
            let there = |(x, y): &&(f64, f64)| beyond(x / last, right) && beyond((y - low) / (high - low), upper);
            let share = |s: &Series| s.points.iter().filter(there).count() as f64 / s.points.len().max(1) as f64;
            self.series.iter().map(share).sum()
        };
        let covered = corners.map(|(corner, right, upper)| (covered(right, upper), corner));
        let emptiest = covered.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        emptiest.map_or(SeriesLabelPosition::UpperRight, |(_, corner)| corner)
    }
}

fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().step_by(stride(points.len())).copied().collect()
}

/// The line of best fit around each point, over about a tenth of the run: unlike a trailing average it lags behind
/// neither a fall nor the ends.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = (points.len() / 20).clamp(2, 200);
    let fit = |i: usize| {
        let near = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
        let (at, n) = (points[i].0, near.len() as f64);
        let mean_x = near.iter().map(|p| p.0 - at).sum::<f64>() / n;
        let mean_y = near.iter().map(|p| p.1).sum::<f64>() / n;
        let spread: f64 = near.iter().map(|p| (p.0 - at - mean_x).powi(2)).sum();
        let rise: f64 = near.iter().map(|p| (p.0 - at - mean_x) * (p.1 - mean_y)).sum();
        let slope = if spread > 0.0 { rise / spread } else { 0.0 };
        (at, mean_y - slope * mean_x)
    };
    (0..points.len()).step_by(stride(points.len())).map(fit).collect()
}

/// Every how manieth point is drawn, so that a long run's picture stays small.
fn stride(points: usize) -> usize {
    points / 2000 + 1
}

/// A range that holds all values with some room; down to zero where they come near it.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if !low.is_finite() || !high.is_finite() {
        return 0.0..1.0;
    }
    let room = if high > low { (high - low) * 0.06 } else { high.abs().max(1e-12) * 0.1 };
    let bottom = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - room };
    bottom..high + room
}

/// As many digits as tell ticks of an axis of this span apart.
fn number(value: f64, span: f64) -> String {
    let digits = (1.5 - span.log10()).ceil().clamp(0.0, 12.0) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize, loss: f64) -> StepReport {
        StepReport { step, loss, lr: 0.1, grad_norm: 1.0, seconds: 0.0 }
    }

    #[test]
    fn the_legend_keeps_off_the_evaluations() {
        let falls: Vec<_> = (1..=100).map(|i| step(i, 1.0 / i as f64)).collect();
        let high = [50, 100].map(|step| EvalReport { step, eval_loss: 1.5, eval_accuracy: None });
        let corner = |evals: &[EvalReport]| {
            let loss = curves("y", &falls, evals).remove(0);
            format!("{:?}", loss.emptiest_corner(100.0, 0.0..1.6))
        };
        assert_eq!((corner(&[]), corner(&high)), ("UpperRight".into(), "UpperLeft".into()));
    }

    #[test]
    fn every_run_has_its_pictures() {
        let eval = |step, eval_loss, eval_accuracy| EvalReport { step, eval_loss, eval_accuracy };
        let many: Vec<_> = (1..200).map(|i| step(i, 2.0 / i as f64 + 0.1 * (i as f64).sin().abs())).collect();
        for (steps, evals, names, words) in [
            (vec![], vec![], &["loss", "learning_rate"][..], &["step"][..]),
            (vec![step(1, 0.5)], vec![], &["loss", "learning_rate"], &["step"]),
            (
                many.clone(),
                vec![eval(100, 0.4, None), eval(199, f64::NAN, None)],
                &["loss", "learning_rate", "eval"],
                &["each step", "smoothed", "evaluation"],
            ),
            (many, vec![eval(199, f64::NAN, Some(0.5))], &["loss", "learning_rate", "eval"], &["smoothed"]),
        ] {
            let curves = curves("logits", &steps, &evals);
            assert_eq!(curves.iter().map(|c| c.name).collect::<Vec<_>>(), names);
            for curve in &curves {
                let svg = curve.svg().unwrap();
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
                let png = image::load_from_memory(&curve.png().unwrap()).unwrap().to_rgb8();
                assert_eq!(png.dimensions(), SIZE);
                // Letters and lines: some ink on white paper.
                let ink = png.pixels().filter(|p| p.0.iter().all(|v| *v < 100)).count();
                assert!((1000..50_000).contains(&ink), "{}: {ink} dark pixels", curve.name);
            }
            for word in words {
                assert!(curves[0].svg().unwrap().contains(word), "{word}");
            }
        }
    }

    #[test]
    fn a_straight_line_is_its_own_smooth_form() {
        let points: Vec<_> = (0..30).map(|i| (i as f64, 2.5 - 0.01 * i as f64)).collect();
        assert!(smooth(&points).iter().zip(&points).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-12));
    }

    #[test]
    fn ticks_have_the_digits_that_tell_them_apart() {
        assert_eq!(number(0.25, 1.0), "0.25");
        assert_eq!(number(1500.0, 3000.0), "1500");
        assert_eq!(number(0.0123, 0.01), "0.0123");
    }
}
