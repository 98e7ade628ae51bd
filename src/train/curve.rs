//! The loss curve as a picture: `loss.svg`.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::metrics::{EvalReport, StepReport};

const SIZE: (u32, u32) = (960, 540);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(230, 230, 230);
const STEP: RGBColor = RGBColor(174, 199, 232);
const SMOOTH: RGBColor = RGBColor(31, 119, 180);
const EVAL: RGBColor = RGBColor(214, 90, 20);

/// Draws the loss of every step, a smooth line through it and the evaluations. Returns the text of an SVG file, or what the
/// drawing library said.
pub fn svg(title: &str, steps: &[StepReport], evals: &[EvalReport]) -> Result<String, String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&area, title, steps, evals).map_err(|e| e.to_string())?;
        area.present().map_err(|e| e.to_string())?;
    }
    Ok(text)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(
    area: &Area,
    title: &str,
    steps: &[StepReport],
    evals: &[EvalReport],
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let losses: Vec<(f64, f64)> = steps.iter().map(|s| (s.step as f64, s.loss)).collect();
    let evals: Vec<(f64, f64)> =
        evals.iter().map(|e| (e.step as f64, e.eval_loss)).filter(|(_, loss)| loss.is_finite()).collect();
    let last = losses.iter().chain(&evals).map(|(step, _)| *step).fold(1.0, f64::max);
    let (low, high) = range(losses.iter().chain(&evals).map(|(_, loss)| *loss));

    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 22).into_font().color(&INK))
        .margin(18)
        .x_label_area_size(46)
        .y_label_area_size(66)
        .build_cartesian_2d(0.0..last * 1.02, low..high)?;
    let label = (FONT, 15).into_font().color(&INK);
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss")
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
    let line = |color: RGBColor, width| {
        move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(width))
    };
    chart
        .draw_series(LineSeries::new(losses.iter().step_by(stride(losses.len())).copied(), STEP.stroke_width(1)))?
        .label("each step")
        .legend(line(STEP, 2));
    if losses.len() >= 10 {
        chart
            .draw_series(LineSeries::new(smooth(&losses), SMOOTH.stroke_width(2)))?
            .label("smoothed")
            .legend(line(SMOOTH, 2));
    }
    if !evals.is_empty() {
        chart.draw_series(LineSeries::new(evals.iter().copied(), EVAL.stroke_width(2)))?;
        chart
            .draw_series(evals.iter().map(|point| Circle::new(*point, 4, EVAL.filled())))?
            .label("evaluation")
            .legend(|(x, y)| Circle::new((x + 12, y), 4, EVAL.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(14)
        .legend_area_size(34)
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .label_font(label)
        .draw()?;
    Ok(())
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
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if !low.is_finite() || !high.is_finite() {
        return (0.0, 1.0);
    }
    let room = if high > low { (high - low) * 0.06 } else { high.abs().max(1.0) * 0.1 };
    let bottom = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - room };
    (bottom, high + room)
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
    fn every_run_has_a_picture() {
        let eval = |step, eval_loss| EvalReport { step, eval_loss, eval_accuracy: None };
        let many: Vec<_> = (1..200).map(|i| step(i, 2.0 / i as f64 + 0.1 * (i as f64).sin().abs())).collect();
        for (steps, evals, words) in [
            (vec![], vec![], vec!["each step"]),
            (vec![step(1, 0.5)], vec![], vec!["each step"]),
            (many, vec![eval(100, 0.4), eval(199, f64::NAN)], vec!["each step", "smoothed", "evaluation"]),
        ] {
            let svg = svg("loss", &steps, &evals).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
            for word in words {
                assert!(svg.contains(word), "{word}");
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
