package waypoint

import (
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"
)

// ended writes the line of a request, and counts it. The keys are those of Istio's JSON access log, with the peers'
// identities and the policy added.
func (p *Proxy) ended(x *exchange, r *http.Request) {
	duration := time.Since(x.start)
	status, flag := x.w.status, "-"
	fields := make([]zap.Field, 0, 30)
	if x.failure != nil {
		flag = x.failure.reason.flag()
		if status == 0 {
			status = reasons[x.failure.reason].status
		}
	}
	grpc := ""
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		if grpc = x.w.Header().Get("Grpc-Status"); grpc == "" {
			grpc = x.w.Header().Get(http.TrailerPrefix + "Grpc-Status")
		}
	}
	var received int64
	if x.body != nil {
		received = x.body.bytes
	}
	p.metrics.request(x, status, flag, grpc, r.ProtoMajor, duration, received)
	entry := p.access.Check(zap.InfoLevel, "request")
	if entry == nil {
		return
	}
	fields = append(fields,
		zap.Time("start_time", x.start), zap.String("method", r.Method), zap.String("path", r.URL.RequestURI()),
		zap.String("protocol", r.Proto), zap.Int("response_code", status), zap.String("response_flags", flag),
		zap.String("authority", r.Host), zap.Int64("bytes_received", received), zap.Int64("bytes_sent", x.w.bytes),
		zap.Int64("duration", duration.Milliseconds()), zap.String("request_id", r.Header.Get(requestIDHeader)),
		zap.String("user_agent", r.UserAgent()))
	fields = appendConn(fields, x.conn)
	if x.decision.Route != nil {
		fields = append(fields, zap.String("route_name", x.decision.Route.Name))
	}
	fields = appendUpstream(fields, x.cluster, x.endpoint)
	if x.verdict.policy != "" {
		fields = append(fields, zap.String("policy", x.verdict.policy))
	}
	if len(x.verdict.dryRun) > 0 {
		fields = append(fields, zap.Strings("dry_run_denied", x.verdict.dryRun))
	}
	if grpc != "" {
		fields = append(fields, zap.String("grpc_status", grpc))
	}
	if x.failure != nil {
		fields = append(fields, zap.String("response_code_details", x.failure.Error()))
	}
	entry.Write(fields...)
}

// logTCP writes the line of a connection that was not HTTP, or never got so far as to be, and counts it.
func (p *Proxy) logTCP(c *inbound, cl *cluster, e *endpoint, f *failure, start time.Time, sent, received int64) {
	flag := "-"
	if f != nil {
		flag = f.reason.flag()
	}
	p.metrics.tcpClosed(c, cl, e, flag, sent, received)
	entry := p.access.Check(zap.InfoLevel, "connection")
	if entry == nil {
		return
	}
	fields := appendConn([]zap.Field{
		zap.Time("start_time", start), zap.String("response_flags", flag), zap.Int64("bytes_received", sent),
		zap.Int64("bytes_sent", received), zap.Int64("duration", time.Since(start).Milliseconds())}, c)
	fields = appendUpstream(fields, cl, e)
	if f != nil {
		fields = append(fields, zap.String("response_code_details", f.Error()))
	}
	entry.Write(fields...)
}

func appendConn(fields []zap.Field, c *inbound) []zap.Field {
	fields = append(fields, zap.String("downstream_remote_address", c.client.String()), zap.String("downstream_local_address", c.authority))
	if !c.source.IsZero() {
		fields = append(fields, zap.String("src.identity", c.source.String()), zap.String("src.namespace", c.source.Namespace))
	}
	if c.from.WorkloadName != "" {
		fields = append(fields, zap.String("src.workload", c.from.WorkloadName))
	}
	return fields
}

func appendUpstream(fields []zap.Field, cl *cluster, e *endpoint) []zap.Field {
	if cl != nil {
		fields = append(fields, zap.String("upstream_cluster", cl.name))
		if cl.service.host != "" {
			fields = append(fields, zap.String("dst.service", cl.service.host))
		}
	}
	if e == nil {
		return fields
	}
	fields = append(fields, zap.String("upstream_host", e.addr.String()))
	if e.peer.hbone {
		fields = append(fields, zap.String("dst.identity", e.peer.identity.String()))
	}
	if e.peer.workload.Name != "" {
		fields = append(fields, zap.String("dst.workload", e.peer.workload.Name), zap.String("dst.namespace", e.peer.workload.Namespace))
	}
	return fields
}
