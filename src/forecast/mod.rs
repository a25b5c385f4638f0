//! Forecast.
