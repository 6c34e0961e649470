package ztunnel

import (
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"strings"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// requestHeader is what a CONNECT says of its connection: who opened it and to which service (forwarded), the source
// workload (baggage) and a trace context.
func requestHeader(client netip.AddrPort, source *mesh.Workload, service *mesh.Service) []hpack.HeaderField {
	forwarded := `for="` + client.String() + `"`
	if service != nil {
		forwarded += ";host=" + service.Hostname
	}
	return []hpack.HeaderField{
		{Name: "baggage", Value: baggage(source)},
		{Name: "forwarded", Value: forwarded},
		{Name: "traceparent", Value: traceparent(rand.Uint64(), rand.Uint64(), rand.Uint64())},
	}
}

// baggage describes a workload in the keys of OpenTelemetry's resources (https://www.w3.org/TR/baggage/).
func baggage(w *mesh.Workload) string {
	kind := w.WorkloadType
	if kind == "" {
		kind = "pod"
	}
	var b strings.Builder
	for _, entry := range [...]struct{ key, value string }{
		{"k8s.cluster.name", w.ClusterID},
		{"k8s.namespace.name", w.Namespace},
		{"k8s." + strings.ToLower(kind) + ".name", w.WorkloadName},
		{"service.name", w.CanonicalName},
		{"service.version", w.CanonicalRevision},
		{"cloud.region", w.Locality.Region},
		{"cloud.availability_zone", w.Locality.Zone},
	} {
		if entry.value == "" {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(entry.key)
		b.WriteByte('=')
		b.WriteString(url.PathEscape(entry.value))
	}
	return b.String()
}

// traceparent starts a trace that is not sampled (https://www.w3.org/TR/trace-context/).
func traceparent(high, low, span uint64) string {
	var id [24]byte
	binary.BigEndian.PutUint64(id[0:], high)
	binary.BigEndian.PutUint64(id[8:], low|1) // all zero is not allowed
	binary.BigEndian.PutUint64(id[16:], span|1)
	text := hex.EncodeToString(id[:])
	return "00-" + text[:32] + "-" + text[32:] + "-00"
}

// forwardedHost is the host that a forwarded header (RFC 7239) names, or "".
func forwardedHost(header string) string {
	first, _, _ := strings.Cut(header, ",")
	for pair := range strings.SplitSeq(first, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if strings.EqualFold(name, "host") {
			return strings.Trim(value, `"`)
		}
	}
	return ""
}
