package agent

import (
	"math"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are the agent's own.
type metrics struct {
	registry   *prometheus.Registry
	redirected prometheus.Histogram
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		redirected: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "fairlead_cni_redirect_seconds", Help: "Time to redirect a starting pod, without the wait for the proxy.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2},
		}),
	}
	m.registry.MustRegister(m.redirected, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// watch adds what is read when somebody asks.
func (m *metrics) watch(e *enroller, w *watcher) {
	mode, _ := e.redirector.Mode()
	m.registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "fairlead_cni_captured_pods", Help: "Pods whose TCP is redirected to the node proxy.",
		}, func() float64 {
			n := 0
			for _, rec := range e.records.all() {
				if rec.Redirected {
					n++
				}
			}
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "fairlead_cni_uncaptured_pods", Help: "Pods that are to be in the mesh and could not be captured.",
		}, func() float64 { return float64(w.uncaptured()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "fairlead_cni_connected_proxies", Help: "Node proxies that are connected.",
		}, func() float64 { return float64(len(e.proxies.Peers())) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "fairlead_cni_redirection", Help: "1 for the way in which this node redirects pods' connections.",
			ConstLabels: prometheus.Labels{"mode": string(mode)},
		}, func() float64 { return 1 }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "fairlead_cni_guard", Help: "1 where TCP that goes round the node proxy is dropped as it leaves a pod, 0 where this node cannot, or not for all pods.",
		}, func() float64 {
			if e.redirector.Guard() != nil {
				return 0
			}
			return 1
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "fairlead_cni_bypass_attempts_total",
			Help: "Packets of TCP that pods sent past the node proxy, which were dropped, and connects with a forged mark, which were redirected.",
		}, func() float64 {
			counters, err := e.redirector.Counters()
			if err != nil {
				return math.NaN()
			}
			return float64(counters["bypass_dropped"] + counters["forged_mark"])
		}),
		kernelCounters{e, prometheus.NewDesc("fairlead_cni_kernel_connections_total",
			"What the redirection programs did with connections.", []string{"what"}, nil)},
	)
}

// kernelCounters are the counters of the redirection programs.
type kernelCounters struct {
	enrol *enroller
	desc  *prometheus.Desc
}

func (k kernelCounters) Describe(to chan<- *prometheus.Desc) { to <- k.desc }

func (k kernelCounters) Collect(to chan<- prometheus.Metric) {
	counters, err := k.enrol.redirector.Counters()
	if err != nil {
		to <- prometheus.NewInvalidMetric(k.desc, err)
		return
	}
	for what, n := range counters {
		to <- prometheus.MustNewConstMetric(k.desc, prometheus.CounterValue, float64(n), what)
	}
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	return mux
}

// healthHandler answers /healthz always, and /readyz once ready returns nil.
func healthHandler(ready func() error) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	return mux
}
