package waypoint

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// unknown is the value of a label where nothing is known, as Istio has it.
const unknown = "unknown"

// peerLabels are those that all metrics have, in the order of peerValues.
var peerLabels = []string{
	"reporter",
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster",
	"destination_service", "destination_service_name", "destination_service_namespace",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
	"destination_principal", "destination_app", "destination_version", "destination_cluster",
	"request_protocol", "response_flags", "connection_security_policy",
}

// metrics are Istio's, reported by a waypoint.
type metrics struct {
	requests             *prometheus.CounterVec
	duration             *prometheus.HistogramVec
	received, sent       *prometheus.HistogramVec
	opened, closed       *prometheus.CounterVec
	tcpReceived, tcpSent *prometheus.CounterVec
}

func newMetrics(registry prometheus.Registerer) *metrics {
	http := append(append([]string{}, peerLabels...), "response_code", "grpc_response_status")
	counter := func(name, help string, labels []string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, http)
	}
	bytes := prometheus.ExponentialBuckets(100, 10, 7)
	m := &metrics{
		requests: counter("istio_requests_total", "Requests.", http),
		duration: histogram("istio_request_duration_milliseconds", "Time from a request's first byte to its response's last.",
			[]float64{.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000}),
		received:    histogram("istio_request_bytes", "Sizes of request bodies.", bytes),
		sent:        histogram("istio_response_bytes", "Sizes of response bodies.", bytes),
		opened:      counter("istio_tcp_connections_opened_total", "Connections opened.", peerLabels),
		closed:      counter("istio_tcp_connections_closed_total", "Connections closed.", peerLabels),
		tcpReceived: counter("istio_tcp_received_bytes_total", "Bytes received from the source.", peerLabels),
		tcpSent:     counter("istio_tcp_sent_bytes_total", "Bytes sent to the source.", peerLabels),
	}
	registry.MustRegister(m.requests, m.duration, m.received, m.sent, m.opened, m.closed, m.tcpReceived, m.tcpSent)
	return m
}

// request counts a request that is over.
func (m *metrics) request(x *exchange, status int, flag, grpc string, protoMajor int, took time.Duration, received int64) {
	protocol := "http"
	if grpc != "" {
		protocol = "grpc"
	} else if protoMajor == 2 {
		protocol = "http2"
	}
	labels := append(peerValues(x.conn, x.cluster, x.endpoint, protocol, flag), strconv.Itoa(status), grpc)
	m.requests.WithLabelValues(labels...).Inc()
	m.duration.WithLabelValues(labels...).Observe(float64(took.Microseconds()) / 1000)
	m.received.WithLabelValues(labels...).Observe(float64(received))
	m.sent.WithLabelValues(labels...).Observe(float64(x.w.bytes))
}

func (m *metrics) tcpOpened(c *inbound, cl *cluster) {
	m.opened.WithLabelValues(peerValues(c, cl, nil, "tcp", "-")...).Inc()
}

func (m *metrics) tcpClosed(c *inbound, cl *cluster, e *endpoint, flag string, received, sent int64) {
	labels := peerValues(c, cl, e, "tcp", flag)
	m.closed.WithLabelValues(labels...).Inc()
	m.tcpReceived.WithLabelValues(labels...).Add(float64(received))
	m.tcpSent.WithLabelValues(labels...).Add(float64(sent))
}

// peerValues are the values of peerLabels.
func peerValues(c *inbound, cl *cluster, e *endpoint, protocol, flag string) []string {
	var service serviceName
	if cl != nil {
		service = cl.service
	}
	var to mesh.Workload
	var identity mesh.Identity
	security := "mutual_tls" // the client's side always is
	if e != nil {
		to, identity = e.peer.workload, e.peer.identity
	}
	from := c.from
	values := []string{
		"waypoint",
		from.WorkloadName, from.CanonicalName, from.CanonicalRevision, from.Namespace,
		c.source.String(), from.CanonicalName, from.CanonicalRevision, from.ClusterID,
		service.host, service.name, service.namespace,
		to.WorkloadName, to.CanonicalName, to.CanonicalRevision, to.Namespace,
		identity.String(), to.CanonicalName, to.CanonicalRevision, to.ClusterID,
		protocol, flag, security,
	}
	for i, v := range values {
		if v == "" {
			values[i] = unknown
		}
	}
	return values
}
