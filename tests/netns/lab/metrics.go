package lab

import (
	"context"
	"fmt"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Metric adds up a counter, or a gauge, of the node's ztunnel over all series that have these labels.
func (n *Node) Metric(ctx context.Context, name string, labels map[string]string) (float64, error) {
	text, err := n.Get(ctx, n.ports.stats, "/metrics")
	if err != nil {
		return 0, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		return 0, fmt.Errorf("parse the metrics of %s: %w", n.Name, err)
	}
	sum := 0.0
	for _, m := range families[name].GetMetric() {
		if hasLabels(m, labels) {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum, nil
}

func hasLabels(m *dto.Metric, labels map[string]string) bool {
	found := 0
	for _, l := range m.GetLabel() {
		if want, asked := labels[l.GetName()]; asked && want == l.GetValue() {
			found++
		}
	}
	return found == len(labels)
}

// Accepted is how many connections the node's ztunnel has let in so far from one proven identity to another.
func (n *Node) Accepted(ctx context.Context, source, destination string) (float64, error) {
	return n.Metric(ctx, "istio_tcp_connections_opened_total", map[string]string{
		"reporter": "destination", "connection_security_policy": "mutual_tls",
		"source_principal": source, "destination_principal": destination,
	})
}
