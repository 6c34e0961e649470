package istiod

import (
	"encoding/json"
	"net/http"
	"net/http/pprof"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fairlead-mesh/fairlead/internal/xds"
)

// metrics of the control plane; Istio's names where it has the same.
type metrics struct {
	registry  *prometheus.Registry
	recompute prometheus.Histogram
	workloads prometheus.Gauge
	services  prometheus.Gauge
	policies  prometheus.Gauge
	waypoints prometheus.Gauge
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		recompute: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fairlead_istiod_recompute_seconds",
			Help: "How long it took to recompute what had changed.", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9)}),
		workloads: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fairlead_istiod_workloads", Help: "Workloads known."}),
		services:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "pilot_services", Help: "Services known."}),
		policies:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "fairlead_istiod_policies", Help: "L4 policies in force."}),
		waypoints: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fairlead_istiod_waypoints", Help: "Waypoints known."}),
	}
	m.registry.MustRegister(m.recompute, m.workloads, m.services, m.policies, m.waypoints,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// serve adds what the xDS server knows.
func (m *metrics) serve(server *xds.Server) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pilot_xds", Help: "Proxies connected over xDS."},
		func() float64 { return float64(len(server.Clients())) }))
}

func (m *metrics) recomputed(took time.Duration, workloads, services, policies, waypoints int) {
	m.recompute.Observe(took.Seconds())
	m.workloads.Set(float64(workloads))
	m.services.Set(float64(services))
	m.policies.Set(float64(policies))
	m.waypoints.Set(float64(waypoints))
}

// monitoring serves /ready, /metrics, /debug/syncz (which proxy has what) and /debug/pprof.
func monitoring(ready *atomic.Bool, m *metrics, server *xds.Server) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "not everything has been listed yet", http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusOK)
	})
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/debug/syncz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		// The reader may have gone; there is nobody to tell.
		_ = encoder.Encode(syncz(server.Clients()))
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// proxyStatus is one connected proxy in /debug/syncz.
type proxyStatus struct {
	Proxy     string       `json:"proxy"`
	Version   string       `json:"version,omitempty"`
	Peer      string       `json:"peer"`
	Connected time.Time    `json:"connected"`
	Types     []typeStatus `json:"types"`
}

// typeStatus is how far a proxy is with one type: SYNCED, STALE (a push is not answered yet) or REJECTED.
type typeStatus struct {
	Type      string     `json:"type"`
	Scope     string     `json:"scope"`
	Status    string     `json:"status"`
	Resources int        `json:"resources"`
	Acked     *time.Time `json:"acked,omitempty"`
	Error     string     `json:"error,omitempty"`
}

func syncz(clients []xds.ClientStatus) []proxyStatus {
	out := make([]proxyStatus, 0, len(clients))
	for _, c := range clients {
		p := proxyStatus{Proxy: c.Node.GetId(), Version: c.Node.GetUserAgentVersion(), Peer: c.Peer, Connected: c.Connected, Types: []typeStatus{}}
		for _, t := range c.Types {
			s := typeStatus{Type: t.TypeURL, Scope: t.Scope, Status: "SYNCED", Resources: t.Resources, Error: t.Rejected}
			if !t.Acked.IsZero() {
				s.Acked = &t.Acked
			}
			switch {
			case t.Rejected != "":
				s.Status = "REJECTED"
			case t.Pending || t.Acked.IsZero():
				s.Status = "STALE"
			}
			p.Types = append(p.Types, s)
		}
		out = append(out, p)
	}
	return out
}
