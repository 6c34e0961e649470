package admin

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

func TestHandlers(t *testing.T) {
	registry := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "connections_total"})
	registry.MustRegister(counter)
	counter.Inc()
	var missing error
	level := zap.NewAtomicLevelAt(zap.InfoLevel)
	adm := Admin(func() any { return map[string]int{"workloads": 3} }, level)
	stats, ready := Stats(registry), Readiness(func() error { return missing })
	missing = errors.New("no configuration yet")
	for _, tc := range []struct {
		name         string
		handler      http.Handler
		method, path string
		body         string
		status       int
		contains     string
	}{
		{"dump", adm, "GET", "/config_dump", "", 200, `"workloads": 3`},
		{"level", adm, "PUT", "/logging", `{"level":"debug"}`, 200, `"debug"`},
		{"profiles", adm, "GET", "/debug/pprof/", "", 200, "goroutine"},
		{"metrics", stats, "GET", "/metrics", "", 200, "connections_total 1"},
		{"metrics, Istio's path", stats, "GET", "/stats/prometheus", "", 200, "connections_total 1"},
		{"not ready", ready, "GET", "/healthz/ready", "", 503, "no configuration yet"},
		{"no dump where metrics are", stats, "GET", "/config_dump", "", 404, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			tc.handler.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, strings.NewReader(tc.body)))
			if w.Code != tc.status || !strings.Contains(w.Body.String(), tc.contains) {
				t.Errorf("%d %q, want %d with %q", w.Code, w.Body, tc.status, tc.contains)
			}
		})
	}
	if level.Level() != zap.DebugLevel {
		t.Errorf("level is %v after PUT /logging", level.Level())
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, "127.0.0.1:0", http.NotFoundHandler()) }()
	cancel()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := Serve(t.Context(), "192.0.2.1:1", http.NotFoundHandler()); err == nil {
		t.Error("served on an address that is not this machine's")
	}
}
