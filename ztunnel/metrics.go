package ztunnel

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// labels are those of Istio's TCP metrics, in the order of series.values.
var labels = []string{
	"reporter",
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster", "source_region", "source_zone",
	"destination_service", "destination_service_namespace", "destination_service_name",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
	"destination_principal", "destination_app", "destination_version", "destination_cluster", "destination_region", "destination_zone",
	"request_protocol", "response_flags", "connection_security_policy",
}

// unknown is the value of a label where nothing is known, as Istio has it.
const unknown = "unknown"

// metrics counts connections. The label values of a pair of workloads are put together once and kept.
type metrics struct {
	vecs   [counterKinds]*prometheus.CounterVec
	limits *prometheus.CounterVec
	series sync.Map // seriesKey → *[counterKinds]prometheus.Counter
}

type counterKind int

const (
	openedTotal counterKind = iota
	closedTotal
	failedTotal
	receivedBytes
	sentBytes
	counterKinds
)

var counters = [counterKinds]prometheus.CounterOpts{
	openedTotal:   {Name: "istio_tcp_connections_opened_total", Help: "Connections opened."},
	closedTotal:   {Name: "istio_tcp_connections_closed_total", Help: "Connections closed."},
	failedTotal:   {Name: "istio_tcp_connections_failed_total", Help: "Connections that could not be made."},
	receivedBytes: {Name: "istio_tcp_received_bytes_total", Help: "Bytes received from the source."},
	sentBytes:     {Name: "istio_tcp_sent_bytes_total", Help: "Bytes sent to the source."},
}

// seriesKey says which series a connection counts in. Workloads and services are immutable, so their pointers stand for
// all that the labels say of them.
type seriesKey struct {
	direction           direction
	source, destination *mesh.Workload
	service             *mesh.Service
	serviceName         string
	sourceID, destID    mesh.Identity
	mutualTLS           bool
	reason              reason
}

func newMetrics(registry prometheus.Registerer) *metrics {
	m := &metrics{}
	for kind, opts := range counters {
		m.vecs[kind] = prometheus.NewCounterVec(opts, labels)
		registry.MustRegister(m.vecs[kind])
	}
	m.limits = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "fairlead_pod_limit_hits_total", Help: "How often a pod or its peers wanted more than one pod may use.",
	}, []string{"namespace", "pod", "limit"})
	registry.MustRegister(m.limits)
	return m
}

func (m *metrics) opened(c *connection) { m.of(c, reasonNone)[openedTotal].Inc() }

// ended counts a connection that is over, or was never made.
func (m *metrics) ended(c *connection, f *failure, request, response int64) {
	r := reasonNone
	if f != nil {
		r = f.reason
	}
	series := m.of(c, r)
	if !c.opened {
		series[failedTotal].Inc()
		return
	}
	series[closedTotal].Inc()
	series[receivedBytes].Add(float64(request))
	series[sentBytes].Add(float64(response))
}

// of finds the series of a connection that ends for reason r.
func (m *metrics) of(c *connection, r reason) *[counterKinds]prometheus.Counter {
	key := seriesKey{c.direction, c.source, c.destination, c.service, c.serviceName, c.sourceID, c.destID, c.mutualTLS, r}
	if known, ok := m.series.Load(key); ok {
		return known.(*[counterKinds]prometheus.Counter)
	}
	values := key.values()
	var made [counterKinds]prometheus.Counter
	for kind, vec := range m.vecs {
		made[kind] = vec.WithLabelValues(values...)
	}
	known, _ := m.series.LoadOrStore(key, &made)
	return known.(*[counterKinds]prometheus.Counter)
}

// forget drops what was kept for workloads and services that a new snapshot does not hold any more; the counters
// themselves stay, as a counter must not go back.
func (m *metrics) forget(gone func(*mesh.Workload, *mesh.Service) bool) {
	m.series.Range(func(k, _ any) bool {
		key := k.(seriesKey)
		if gone(key.source, key.service) || gone(key.destination, nil) {
			m.series.Delete(k)
		}
		return true
	})
}

func (k seriesKey) values() []string {
	reporter := "source"
	if k.direction == inbound {
		reporter = "destination"
	}
	security := unknown
	if k.mutualTLS {
		security = "mutual_tls"
	}
	serviceName, serviceNamespace, serviceHost := unknown, unknown, unknown
	switch {
	case k.service != nil:
		serviceName, serviceNamespace, serviceHost = k.service.Name, k.service.Namespace, k.service.Hostname
	case k.serviceName != "":
		serviceHost = k.serviceName
	}
	values := make([]string, 0, len(labels))
	values = append(values, reporter)
	values = append(values, peerValues(k.source, k.sourceID)...)
	values = append(values, serviceHost, serviceNamespace, serviceName)
	values = append(values, peerValues(k.destination, k.destID)...)
	return append(values, "tcp", k.reason.flag(), security)
}

// peerValues are the ten labels of one end.
func peerValues(w *mesh.Workload, id mesh.Identity) []string {
	if w == nil {
		w = &mesh.Workload{}
	}
	values := []string{
		w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace, id.String(),
		w.CanonicalName, w.CanonicalRevision, w.ClusterID, w.Locality.Region, w.Locality.Zone,
	}
	for i, v := range values {
		if v == "" {
			values[i] = unknown
		}
	}
	return values
}
