package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// colors are the lanes', in order.
var colors = []string{"#8c8c8c", "#1f6feb", "#79b8ff", "#bf4b8a", "#d97706"}

// panel is one bar chart.
type panel struct {
	title string
	bars  []bar
}

type bar struct {
	lane  string
	value spread
}

// The plot's measures, in pixels.
const (
	panelWidth, panelGap  = 470, 30
	labelWidth, textWidth = 110, 90
	barHeight, titleRoom  = 20, 34
	headRoom              = 40
)

// plot draws each test as bars, the median with whiskers from the least to the greatest, two columns: what it costs, and
// what it does.
func (w *world) plot(f figures) string {
	var rows [][2]panel
	for _, t := range tests {
		if !slices.Contains(w.options.tests, t.name) {
			continue
		}
		cost := panel{title: t.name + ": CPU s/" + t.unit + " (less is better)"}
		does := panel{title: t.name + ": " + t.rate}
		if t.latency {
			does.title = t.name + ": p50 µs (less is better)"
		}
		for _, l := range w.lanes {
			s, found := summarize(f, t, l.name)
			if !found {
				continue
			}
			value := s.rate
			if t.latency {
				value = s.p50
			}
			cost.bars, does.bars = append(cost.bars, bar{lane: l.name, value: s.cpu}), append(does.bars, bar{lane: l.name, value: value})
		}
		rows = append(rows, [2]panel{cost, does})
	}
	height := headRoom
	var b strings.Builder
	for _, row := range rows {
		for i, p := range row {
			p.draw(&b, w, i*(panelWidth+panelGap)+20, height)
		}
		height += titleRoom + barHeight*max(len(row[0].bars), len(row[1].bars)) + 14
	}
	width := 2*panelWidth + panelGap + 40
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">
<rect width="%[1]d" height="%[2]d" fill="white"/>
<text x="20" y="24" font-size="15" font-weight="bold">CPU of all proxies on the way, and what they carry: median, least to greatest</text>
%[3]s</svg>
`, width, height+10, b.String())
}

func (p panel) draw(b *strings.Builder, w *world, x, y int) {
	most := 0.0
	for _, bar := range p.bars {
		if !math.IsNaN(bar.value.Max) {
			most = max(most, bar.value.Max)
		}
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" font-weight="bold">%s</text>`+"\n", x, y+20, html.EscapeString(p.title))
	scale := func(v float64) float64 { return v / most * (panelWidth - labelWidth - textWidth) }
	for i, bar := range p.bars {
		top := y + titleRoom + i*barHeight
		fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", x+labelWidth-6, top+14, html.EscapeString(bar.lane))
		if math.IsNaN(bar.value.Median) || most == 0 {
			fmt.Fprintf(b, `<text x="%d" y="%d" fill="#888">–</text>`+"\n", x+labelWidth+4, top+14)
			continue
		}
		left, middle := float64(x+labelWidth), float64(top)+barHeight/2
		fmt.Fprintf(b, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", left, top+3, scale(bar.value.Median), barHeight-6, w.color(bar.lane))
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="black"/>`+"\n",
			left+scale(bar.value.Min), left+scale(bar.value.Max), middle, middle)
		fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`+"\n", left+scale(bar.value.Max)+6, top+14, digits(bar.value.Median))
	}
}

// color is the same for a lane in every run.
func (w *world) color(lane string) string {
	return colors[slices.Index(laneNames(), lane)%len(colors)]
}
