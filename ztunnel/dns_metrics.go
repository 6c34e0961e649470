package ztunnel

import (
	"sync"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// dnsLabels are those of Istio's DNS metrics.
var dnsLabels = []string{"request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"}

// dnsMetrics counts DNS queries.
type dnsMetrics struct {
	requests, upstreamRequests, upstreamFailures *prometheus.CounterVec
	upstreamDuration                             *prometheus.HistogramVec
	series                                       sync.Map // dnsSeriesKey → *dnsSeries
}

// dnsSeries are the counters of one kind of query.
type dnsSeries struct {
	requests, upstreamRequests, upstreamFailures prometheus.Counter
	upstreamDuration                             prometheus.Observer
}

type dnsSeriesKey struct{ kind, protocol, service, revision string }

func newDNSMetrics(registry prometheus.Registerer) *dnsMetrics {
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, dnsLabels)
	}
	m := &dnsMetrics{
		requests:         counter("istio_dns_requests_total", "DNS requests."),
		upstreamRequests: counter("istio_dns_upstream_requests_total", "DNS requests forwarded to a resolver."),
		upstreamFailures: counter("istio_dns_upstream_failures_total", "DNS requests that the resolver did not answer."),
		upstreamDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "istio_dns_upstream_request_duration_seconds", Help: "Time that the resolver took to answer.",
			Buckets: []float64{0.0005, 0.001, 0.01, 0.1, 1, 5},
		}, dnsLabels),
	}
	registry.MustRegister(m.requests, m.upstreamRequests, m.upstreamFailures, m.upstreamDuration)
	return m
}

// of finds the counters for a query; source is nil where it is not known.
func (m *dnsMetrics) of(q query, protocol string, source *mesh.Workload) *dnsSeries {
	key := dnsSeriesKey{typeName(q.kind), protocol, unknown, unknown}
	if source != nil && source.CanonicalName != "" {
		key.service = source.CanonicalName
	}
	if source != nil && source.CanonicalRevision != "" {
		key.revision = source.CanonicalRevision
	}
	if known, ok := m.series.Load(key); ok {
		return known.(*dnsSeries)
	}
	values := []string{key.kind, key.protocol, key.service, key.revision}
	known, _ := m.series.LoadOrStore(key, &dnsSeries{
		m.requests.WithLabelValues(values...), m.upstreamRequests.WithLabelValues(values...),
		m.upstreamFailures.WithLabelValues(values...), m.upstreamDuration.WithLabelValues(values...),
	})
	return known.(*dnsSeries)
}

// typeName is the label of a query type. A pod may ask for any of 65,536: those that are rare have one name together.
func typeName(kind uint16) string {
	switch kind {
	case dns.TypeA:
		return "a"
	case dns.TypeAAAA:
		return "aaaa"
	case dns.TypeCNAME:
		return "cname"
	case dns.TypeHTTPS:
		return "https"
	case dns.TypeMX:
		return "mx"
	case dns.TypeNS:
		return "ns"
	case dns.TypePTR:
		return "ptr"
	case dns.TypeSOA:
		return "soa"
	case dns.TypeSRV:
		return "srv"
	case dns.TypeSVCB:
		return "svcb"
	case dns.TypeTXT:
		return "txt"
	}
	return "other"
}
